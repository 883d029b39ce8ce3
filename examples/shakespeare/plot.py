"""The picture of a race: losses, the estimates d, and the time of every optimizer step."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from display import COLOURS
from runs import REFERENCE, chip

# The two Prodigys' curves coincide: a wide pale line below, a thin one above, and both are seen.
LINES = {"prodigy_fused": (1.5, 1.0, 3), REFERENCE: (4.5, 0.45, 2), "adamw": (1.5, 1.0, 1)}  # width, alpha, order


def running(values, window, statistic):
    """Returns `statistic` of the last `window` values, at every position."""
    return [statistic(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def plot_losses(axes, runs):
    """Draws the training loss (running mean) as lines, the validation loss as points."""
    top = 0.0
    for run in runs:
        width, alpha, order = LINES[run.name]
        smooth = running(run.losses, 20, statistics.fmean)
        steps = range(1, len(smooth) + 1)
        colour = COLOURS[run.name]
        axes.plot(steps, smooth, color=colour, linewidth=width, alpha=alpha, zorder=order, label=run.label)
        marker = 9 if run.name == REFERENCE else 4.5
        axes.plot(*zip(*run.val, strict=True), "o", color=colour, markersize=marker, alpha=alpha, zorder=order)
        # The drop of the first few steps is the same for all: scale the axis to what follows.
        top = max(top, smooth[len(smooth) // 25])
    axes.plot([], [], "o", color="black", markersize=4.5, label="points: validation")
    axes.set_ylim(top=1.02 * top)
    axes.set(title="Loss (mean of the last 20 batches)", xlabel="step", ylabel="nats per character")
    axes.legend()


def plot_d(axes, runs):
    """Draws the estimates d, with AdamW's hand-picked learning rate for comparison."""
    for run in runs:
        width, alpha, order = LINES[run.name]
        style = {"color": COLOURS[run.name], "linewidth": width, "alpha": alpha, "zorder": order}
        if run.d:
            axes.plot(range(1, len(run.d) + 1), run.d, label=run.label, **style)
        elif run.name == "adamw":
            axes.axhline(run.schedule.base_lrs[0], linestyle="--", label="AdamW's lr, by hand", **style)
    axes.set(title="Step size d that Prodigy estimates", xlabel="step", ylabel="d", yscale="log")
    axes.legend()


def plot_times(axes, runs, figures):
    """Draws every optimizer step, faint, and their running median."""
    for run in runs:
        colour, steps = COLOURS[run.name], range(1, len(run.optimizer_ms) + 1)
        median = figures["optimizers"][run.name]["optimizer_ms"]
        axes.plot(steps, run.optimizer_ms, ".", color=colour, markersize=2, alpha=0.25)
        smooth = running(run.optimizer_ms, 50, statistics.median)
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{run.label}: {median:.2f} ms")
    axes.set(title="Time of optimizer.step(), running median", xlabel="step", ylabel="ms", yscale="log")
    # One step that lost its processor for a second must not squeeze the rest into a line.
    cuts = statistics.quantiles([ms for run in runs for ms in run.optimizer_ms], n=50, method="inclusive")
    axes.set_ylim(0.7 * cuts[0], 4 * cuts[-1])
    axes.legend(loc="upper right")


def plot(runs, figures, path):
    """Writes the three panels to `path`, and returns it."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    plot_losses(left, runs)
    plot_d(middle, runs)
    plot_times(right, runs, figures)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"A character GPT of {figures['parameters']:,} parameters on Shakespeare, same start and same batches"
    figure.suptitle(f"{title} ({chip(figures)})", fontsize=13)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
