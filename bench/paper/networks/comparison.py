"""What the experiments with networks have in common: the columns, which runs are compared, bands, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from shared import palette

from paper.networks.training import CORRECTED, Task, train
from paper.report import Verdict

Row = dict[str, Any]
NUMBERS = ("score", "test_loss", "train_loss", "average_score", "d", "steps", "losses", "tests", "ds")
SEEDS = range(3)
GRID = (1e-3, 3e-3, 1e-2, 3e-2)  # learning rates of the hand-tuned Adam
ADAM, TUNED = "AdamW", "tuned Adam"
ADAPTIVE = ("Prodigy", CORRECTED, "D-Adapt Adam", ADAM)
COLOURS = {
    "Prodigy": palette.OURS,
    CORRECTED: "#e69f00",
    "D-Adapt Adam": palette.REFERENCE,
    TUNED: "#000000",
    "DoG": "#009e73",
    "L-DoG": "#cc79a7",
}
# What "close" is taken to mean. In the paper's worst case, ViT on ImageNet, Prodigy is 0.8 points of accuracy behind.
CLOSE = {"%": 1.0, "nats": 0.03}
DIGITS = {"%": 2, "nats": 3}
Methods = dict[str, list[Row]]


def record(task: Task, key: Row) -> Row:
    """Does a run with the method, value and seed of its key; returns NUMBERS."""
    found = train(task, key["method"], key["value"], key["seed"])
    return {
        "score": found["test"]["score"],
        "test_loss": found["test"]["loss"],
        "train_loss": found["train"],
        "average_score": found["average"]["score"],
        **{name: found[name] for name in ("d", "steps", "losses", "tests", "ds")},
    }


def runs(methods: tuple[str, ...], grid: tuple[float, ...] = GRID) -> Iterator[Row]:
    """Yields the runs to compare: each method as it comes, Adam with each learning rate of a grid; three seeds."""
    for seed in SEEDS:
        for method in methods:
            for value in grid if method == ADAM else (1.0,):
                yield {"method": method, "value": value, "seed": seed}


def mean(rows: list[Row], number: str = "score") -> float:
    """Returns the mean over the seeds; a run that diverged makes it NaN."""
    return fmean(float(row[number]) for row in rows)


def compared(rows: list[Row], unit: str) -> Methods:
    """Returns the rows to compare by method.

    Args:
        rows: of one task.
        unit: of the score: "%", of which more is better, or "nats".

    Returns:
        The rows with the default setting and, as `TUNED`, Adam's with the learning rate whose mean score is best: of
        the very test that decides, which is in Adam's favour.
    """
    found: Methods = {}
    tried: dict[float, list[Row]] = {}
    for row in rows:
        if row["method"] == ADAM:
            tried.setdefault(row["value"], []).append(row)
        elif row["value"] == 1:
            found.setdefault(row["method"], []).append(row)
    if tried:
        most = max(map(len, tried.values()))  # of the seeds: some runs may not have been done yet
        whole = [same for same in tried.values() if len(same) == most]
        found[TUNED] = min(whole, key=lambda same: _badness(mean(same), unit))
    return found


def _badness(score: float, unit: str) -> float:
    return math.inf if math.isnan(score) else -score if unit == "%" else score


def behind(methods: Methods, method: str, other: str, unit: str) -> float:
    """Returns by how much the mean score of one method is worse than another's; negative: it is better."""
    return _badness(mean(methods[method]), unit) - _badness(mean(methods[other]), unit)


def error(*methods: list[Row]) -> float:
    """Returns the standard error of the difference of two mean scores; 0 with one seed, or where one diverged."""
    spreads = [stdev(float(row["score"]) for row in rows) / math.sqrt(len(rows)) for rows in methods if len(rows) > 1]
    return 0.0 if any(map(math.isnan, spreads)) else math.hypot(*spreads)


def cell(rows: list[Row], number: str, digits: int) -> str:
    """Returns the mean and standard deviation over the seeds, as text."""
    values = [float(row[number]) for row in rows]
    if any(math.isnan(value) for value in values):
        return "diverged"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def close(
    claim: str, tasks: dict[str, tuple[Methods, str]], other: str, margin: bool, method: str = "Prodigy"
) -> Verdict:
    """Returns the verdict on a claim that a method is as good as another.

    Args:
        claim: in the paper's words.
        tasks: the compared rows, and the unit of the score, by task.
        other: the other method.
        margin: whether the method may be behind by CLOSE; otherwise it has to be ahead, by more than the standard error
            of the difference.
        method: the method.
    """

    def holds(methods: Methods, unit: str) -> bool:
        gap = behind(methods, method, other, unit)
        return gap <= CLOSE[unit] if margin else gap < -error(methods[method], methods[other])

    return _judge(claim, tasks, method, other, holds)


def same(claim: str, tasks: dict[str, tuple[Methods, str]], other: str, method: str = "Prodigy") -> Verdict:
    """Returns the verdict on a claim that two methods are equally good: neither is ahead by more than CLOSE."""
    return _judge(claim, tasks, method, other, lambda own, unit: abs(behind(own, method, other, unit)) <= CLOSE[unit])


def _judge(
    claim: str,
    tasks: dict[str, tuple[Methods, str]],
    method: str,
    other: str,
    holds_for: Callable[[Methods, str], bool],
) -> Verdict:
    parts, good = [], []
    for task, (methods, unit) in tasks.items():
        if not {method, other} <= set(methods):
            continue
        good.append(holds_for(methods, unit))
        scores = [cell(methods[name], "score", DIGITS[unit]) for name in (method, other)]
        parts.append(f"{task} {scores[0]} against {scores[1]} {unit}")
    holds = (all(good) or (None if any(good) else False)) if good else None
    return Verdict(claim, f"{sum(good)} of {len(good)}: " + "; ".join(parts), holds)


def band(axes: plt.Axes, rows: list[Row], curve: str, method: str) -> None:
    """Draws the mean of a curve over the seeds, and a band of one standard deviation."""
    whole = [row for row in rows if isinstance(row[curve], tuple)]
    length = min((len(row[curve]) for row in whole), default=0)
    if not length:
        return
    lines, steps = np.array([row[curve][:length] for row in whole]), whole[0]["steps"][:length]
    centre, spread = lines.mean(0), lines.std(0, ddof=1) if len(lines) > 1 else 0 * lines[0]
    axes.plot(steps, centre, color=COLOURS[method], label=method, linewidth=1.3)
    axes.fill_between(steps, centre - spread, centre + spread, color=COLOURS[method], alpha=0.2, linewidth=0)


def panels(tasks: dict[str, Methods], curves: dict[str, tuple[str, str]]) -> plt.Figure:
    """Plots a line of panels per task.

    Args:
        tasks: the compared rows by task.
        curves: of each panel, by its label: the column, and the scale of its axis.
    """
    size = (3.6 * len(curves), 2.6 * len(tasks))
    figure, grid = plt.subplots(len(tasks), len(curves), figsize=size, layout="constrained", squeeze=False)
    for line, (task, methods) in zip(grid, tasks.items(), strict=True):
        for axes, (label, (curve, scale)) in zip(line, curves.items(), strict=True):
            for method in (method for method in COLOURS if method in methods):
                band(axes, methods[method], curve, method)
            axes.set(title=f"{task}: {label}", yscale=scale)
            axes.grid(alpha=0.25)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles) or 1, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure
