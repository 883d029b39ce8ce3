"""What the demo shows: a live display while it trains, then a table, a plot and the figures."""

import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform
import statistics
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rows import processor

REFERENCE = "prodigyopt"
COLOURS = {"prodigy_fused": "#d55e00", "prodigyopt": "#0072b2", "adamw": "#7f7f7f"}
# Curves of the two Prodigys lie on each other: a wide pale line below, a thin one above, and both are seen.
LINES = {"prodigy_fused": (1.5, 1.0, 3), "prodigyopt": (4.5, 0.45, 2), "adamw": (1.5, 1.0, 1)}
REFRESH_SECONDS = 0.25
BUSY = 1.5


@dataclasses.dataclass
class Racer:
    """One optimizer, its own copy of the model, and what was recorded of them (one entry per step)."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list = dataclasses.field(default_factory=list)
    d: list = dataclasses.field(default_factory=list)
    optimizer_ms: list = dataclasses.field(default_factory=list)
    step_ms: list = dataclasses.field(default_factory=list)
    val: list = dataclasses.field(default_factory=list)  # pairs (step, loss)
    train_loss: float = float("nan")

    @property
    def label(self):
        """The name as tables and legends show it."""
        if self.name == "adamw":
            return f"AdamW, lr {self.schedule.base_lrs[0]:g}"
        return self.name


def running(values, window, statistic):
    """`statistic` of the last `window` values, at every position."""
    return [statistic(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


class Display:
    """A progress bar over a table of the race so far; off a terminal, one line per validation."""

    def __init__(self, racers, steps):
        self.racers = racers
        self.progress = Progress(BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.task = self.progress.add_task("training", total=steps)
        # Refreshed by hand between steps: a refreshing thread would run into the timings.
        self.live = Live(auto_refresh=False, transient=True)
        self.shown = 0.0

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *_):
        self.live.stop()

    def update(self, step):
        """Redraw, if the last time is long enough ago."""
        if time.perf_counter() - self.shown < REFRESH_SECONDS or not self.live.console.is_terminal:
            return
        self.progress.update(self.task, completed=step)
        table = Table("optimizer", "train loss", "val loss", "d", "ms/step", box=None, pad_edge=False)
        for racer in self.racers:
            loss = statistics.fmean(racer.losses[-20:])
            val = f"{racer.val[-1][1]:.3f}" if racer.val else ""
            d = f"{racer.d[-1]:.2e}" if racer.d else ""
            milliseconds = f"{statistics.median(racer.optimizer_ms[-50:]):.2f}"
            table.add_row(racer.label, f"{loss:.3f}", val, d, milliseconds, style=COLOURS[racer.name])
        self.live.update(Group(self.progress, table), refresh=True)
        self.shown = time.perf_counter()

    def line(self, step):
        """A line of text for a log, where there is no terminal."""
        if self.live.console.is_terminal:
            return
        parts = []
        for racer in self.racers:
            d = f", d {racer.d[-1]:.1e}" if racer.d else ""
            train, val = statistics.fmean(racer.losses[-20:]), racer.val[-1][1]
            parts.append(f"{racer.name}: train {train:.3f}, val {val:.3f}{d}")
        print(f"step {step}  " + "  |  ".join(parts), flush=True)


def machine(device):
    """Where and with what the figures were measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("prodigy-fused", "prodigyopt"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    where = {"device": device, "cpu": processor(), **gpu, "threads": torch.get_num_threads()}
    return {"date": datetime.date.today().isoformat(), **where, **versions}


def summary(racers, args, seconds):
    """All figures of the run as plain numbers, ready for JSON."""
    reference = [statistics.median(racer.optimizer_ms) for racer in racers if racer.name == REFERENCE]
    results = {}
    for racer in racers:
        # Medians: the first steps allocate the state, and other programs take the processor now and then.
        optimizer_ms, step_ms = statistics.median(racer.optimizer_ms), statistics.median(racer.step_ms)
        results[racer.name] = {
            "label": racer.label,
            "train_loss": racer.train_loss,
            "val_loss": racer.val[-1][1],
            "last_batch_loss": racer.losses[-1],
            "d": racer.d[-1] if racer.d else None,
            "optimizer_ms": optimizer_ms,
            # Far below the median: the machine was busy, which hits the longer steps of the reference most.
            "optimizer_ms_fastest_tenth": sorted(racer.optimizer_ms)[len(racer.optimizer_ms) // 10],
            "step_ms": step_ms,
            "optimizer_share": optimizer_ms / step_ms,
            "speedup_over_reference": reference[0] / optimizer_ms if reference else None,
        }
    numels = [parameter.numel() for parameter in racers[0].model.parameters()]
    return {
        "machine": machine(args.device),
        "options": {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()},
        "parameters": sum(numels),
        "tensors": len(numels),
        "seconds": seconds,
        "optimizers": results,
    }


def chip(figures):
    """The processor that did the work, for captions."""
    where = figures["machine"]
    return where.get("gpu") or f"{where['cpu']}, {where['threads']} thread{'s' * (where['threads'] > 1)}"


def print_report(figures):
    """The closing table, and where it was measured."""
    options = figures["options"]
    title = (
        f"GPT of {figures['parameters']:,} parameters in {figures['tensors']} tensors, Shakespeare, "
        f"{options['steps']} steps of {options['batch']} x {options['block']} characters"
    )
    table = Table(title=title)
    table.add_column("optimizer")
    for heading in ("train loss", "val loss", "d", "optimizer ms", "share of step", f"vs {REFERENCE}"):
        table.add_column(heading, justify="right")
    for name, row in figures["optimizers"].items():
        d = "" if row["d"] is None else f"{row['d']:.3e}"
        speedup = row["speedup_over_reference"]
        table.add_row(
            row["label"],
            f"{row['train_loss']:.4f}",
            f"{row['val_loss']:.4f}",
            d,
            f"{row['optimizer_ms']:.3f}",
            f"{row['optimizer_share']:.1%}",
            f"{speedup:.2f} x" if speedup else "",
            style=COLOURS[name],
        )
    # A log has no width of its own; rich's default of 80 would break the rows.
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    console.print(table)
    print(f"Times: medians on {chip(figures)}, torch {torch.__version__}.")
    print(f"The race took {figures['seconds']:.0f} s.")
    rows = figures["optimizers"].values()
    busy = max(row["optimizer_ms"] / row["optimizer_ms_fastest_tenth"] for row in rows)
    if busy > BUSY:
        print(f"Do not quote the times: the machine was busy (a median is {busy:.1f} x the fastest tenth).")


def plot_losses(axes, racers):
    """Training loss (running mean) as lines, validation loss as points."""
    top = 0.0
    for racer in racers:
        width, alpha, order = LINES[racer.name]
        smooth = running(racer.losses, 20, statistics.fmean)
        steps = range(1, len(smooth) + 1)
        colour = COLOURS[racer.name]
        axes.plot(steps, smooth, color=colour, linewidth=width, alpha=alpha, zorder=order, label=racer.label)
        marker = 9 if racer.name == REFERENCE else 4.5
        axes.plot(*zip(*racer.val, strict=True), "o", color=colour, markersize=marker, alpha=alpha, zorder=order)
        # The plunge of the first few steps is the same for everybody; what follows is to fill the panel.
        top = max(top, smooth[len(smooth) // 25])
    axes.plot([], [], "o", color="black", markersize=4.5, label="points: validation")
    axes.set_ylim(top=1.02 * top)
    axes.set(title="Loss (mean of the last 20 batches)", xlabel="step", ylabel="nats per character")
    axes.legend()


def plot_d(axes, racers):
    """The estimates d, with AdamW's hand-picked learning rate for comparison."""
    for racer in racers:
        width, alpha, order = LINES[racer.name]
        style = {"color": COLOURS[racer.name], "linewidth": width, "alpha": alpha, "zorder": order}
        if racer.d:
            axes.plot(range(1, len(racer.d) + 1), racer.d, label=racer.label, **style)
        elif racer.name == "adamw":
            axes.axhline(racer.schedule.base_lrs[0], linestyle="--", label="AdamW's lr, by hand", **style)
    axes.set(title="Step size d that Prodigy estimates", xlabel="step", ylabel="d", yscale="log")
    axes.legend()


def plot_times(axes, racers, figures):
    """Every optimizer step, faint, and its running median."""
    for racer in racers:
        colour, steps = COLOURS[racer.name], range(1, len(racer.optimizer_ms) + 1)
        median = figures["optimizers"][racer.name]["optimizer_ms"]
        axes.plot(steps, racer.optimizer_ms, ".", color=colour, markersize=2, alpha=0.25)
        smooth = running(racer.optimizer_ms, 50, statistics.median)
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{racer.label}: {median:.2f} ms")
    axes.set(title="Time of optimizer.step(), running median", xlabel="step", ylabel="ms", yscale="log")
    # One step that lost its processor for a second must not squeeze the rest into a line.
    cuts = statistics.quantiles([ms for racer in racers for ms in racer.optimizer_ms], n=50, method="inclusive")
    axes.set_ylim(0.7 * cuts[0], 4 * cuts[-1])
    axes.legend(loc="upper right")


def plot(racers, figures, path):
    """Write the three panels to `path`; returns it."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    plot_losses(left, racers)
    plot_d(middle, racers)
    plot_times(right, racers, figures)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    what = f"A character GPT of {figures['parameters']:,} parameters on Shakespeare, same start and same batches"
    figure.suptitle(f"{what} ({chip(figures)})", fontsize=13)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
