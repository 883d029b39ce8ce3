"""The race on the terminal: a live display while it runs, and the closing table."""

import statistics
import time

import palette
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from runs import REFERENCE, chip

COLOURS = {"prodigy_fused": palette.OURS, REFERENCE: palette.REFERENCE, "adamw": palette.OTHER}
REFRESH_SECONDS = 0.25
BUSY = 1.5  # a median this many times the fastest tenth is no measurement


class Display:
    """A progress bar over a table of the race so far; off a terminal, one line per validation."""

    def __init__(self, runs, steps):
        self.runs = runs
        self.progress = Progress(BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.task = self.progress.add_task("training", total=steps)
        # Refreshed by hand between steps: a refreshing thread would disturb the timings.
        self.live = Live(auto_refresh=False, transient=True)
        self.shown = 0.0

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *_):
        self.live.stop()

    def update(self, step):
        """Redraws the display, at most every `REFRESH_SECONDS`."""
        if time.perf_counter() - self.shown < REFRESH_SECONDS or not self.live.console.is_terminal:
            return
        self.progress.update(self.task, completed=step)
        table = Table("optimizer", "train loss", "val loss", "d", "ms/step", box=None, pad_edge=False)
        for run in self.runs:
            val = f"{run.val[-1][1]:.3f}" if run.val else ""
            d = f"{run.d[-1]:.2e}" if run.d else ""
            milliseconds = f"{statistics.median(run.optimizer_ms[-50:]):.2f}"
            table.add_row(run.label, f"{run.recent_loss:.3f}", val, d, milliseconds, style=COLOURS[run.name])
        self.live.update(Group(self.progress, table), refresh=True)
        self.shown = time.perf_counter()

    def line(self, step):
        """Prints a line of text for a log, where there is no terminal."""
        if self.live.console.is_terminal:
            return
        parts = []
        for run in self.runs:
            d = f", d {run.d[-1]:.1e}" if run.d else ""
            parts.append(f"{run.name}: train {run.recent_loss:.3f}, val {run.val[-1][1]:.3f}{d}")
        print(f"step {step}  " + "  |  ".join(parts), flush=True)


def print_report(figures):
    """Prints the closing table, and where it was measured."""
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
