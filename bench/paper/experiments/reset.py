"""Resetting: by which factor must the estimate have grown for a reset? (2 in the paper)

"line" is f(x) = |x - D| so far from D that the gradient never changes; the others are data sets of Figure 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

import matplotlib.pyplot as plt
import torch

from paper import convex, data
from paper.experiments import Row
from paper.report import Verdict
from prodigy_fused.convex import DAdaptReset

PART = "convex"
PACKAGES = data.PACKAGES
KEYS = ("problem", "threshold", "seed")
NUMBERS = ("steps_per_doubling", "resets", "accuracy", "area")
THRESHOLDS = (1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 8, 20, 22)
SETS = ("iris", "vehicle", "vowel")
D0 = 1e-6
PAPERS = 2  # threshold


def runs(full: bool) -> Iterator[Row]:
    """Yields the line once, every data set with ten starts; `full` is no more."""
    for threshold in THRESHOLDS:
        yield {"problem": "line", "threshold": threshold, "seed": 0}
        for name in SETS:
            for seed in range(10):
                yield {"problem": name, "threshold": threshold, "seed": seed}


def run(key: Row) -> Row:
    """Takes 1,000 steps."""
    if key["problem"] == "line":
        return {**_on_the_line(key["threshold"]), "accuracy": "", "area": ""}
    made = []

    def method(params: list[torch.Tensor]) -> DAdaptReset:
        made.append(DAdaptReset(params, d0=D0, threshold=key["threshold"]))
        return made[0]

    rows = data.SIZES[key["problem"]][0]
    found = convex.train(key["problem"], rows, key["seed"], method)
    return {"steps_per_doubling": "", "resets": made[0].epoch, "accuracy": found.accuracy, "area": found.area}


def _on_the_line(threshold: float) -> Row:
    """Counts the steps from the first reset to the last, and the doublings between them."""
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DAdaptReset([x], d0=D0, threshold=threshold)
    at = []  # of each reset: the step, the estimate after it
    for k in range(convex.STEPS):
        x.grad = torch.full_like(x, -1.0)
        optimizer.step()
        if optimizer.epoch > len(at):
            at.append((k, optimizer.d))
    doublings = math.log2(at[-1][1] / at[0][1]) if len(at) > 1 else 0
    return {"steps_per_doubling": (at[-1][0] - at[0][0]) / doublings if doublings else "", "resets": len(at)}


def _line(rows: list[Row]) -> dict[float, Row]:
    return {row["threshold"]: row for row in rows if row["problem"] == "line"}


def _mean(rows: list[Row], problem: str, threshold: float, number: str) -> float:
    return fmean(row[number] for row in rows if (row["problem"], row["threshold"]) == (problem, threshold))


def _thresholds(rows: list[Row], problem: str) -> list[float]:
    return sorted({row["threshold"] for row in rows if row["problem"] == problem})


def plot(rows: list[Row]) -> dict[str, plt.Figure]:
    """Plots the steps of a doubling, and the accuracies, against the threshold."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    line = {t: row["steps_per_doubling"] for t, row in sorted(_line(rows).items()) if row["steps_per_doubling"]}
    left.plot(list(line), list(line.values()), marker="o", color="black")
    left.set(ylabel="steps per doubling of d", title="on the line")
    for name in dict.fromkeys(row["problem"] for row in rows if row["problem"] != "line"):
        thresholds = _thresholds(rows, name)
        right.plot(thresholds, [100 * _mean(rows, name, t, "area") for t in thresholds], marker="o", label=name)
    right.set(ylabel="accuracy, mean over the steps, %", title="on data")
    right.legend()
    for axes in (left, right):
        axes.axvline(PAPERS, color="grey", linestyle=":")
        axes.set(xscale="log", xlabel="threshold of a reset")
        axes.set_xticks([1.2, 1.5, 2, 3, 4, 8, 20], ["1.2", "1.5", "2", "3", "4", "8", "20"], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    return {"": figure}


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Returns what became of every threshold."""
    line, sets = _line(rows), [name for name in SETS if any(row["problem"] == name for row in rows)]
    header = ["threshold", "steps per doubling", "resets in 1,000 steps", *(f"{name}, %" for name in sets)]
    lines = []
    for threshold, row in sorted(line.items()):
        steps = f"{row['steps_per_doubling']:.1f}" if row["steps_per_doubling"] else "-"
        found = [f"{100 * _mean(rows, name, threshold, 'accuracy'):.1f}" for name in sets]
        lines.append([f"{threshold:g}", steps, str(row["resets"]), *found])
    return {"Thresholds; final accuracy of the average": [header, *lines]}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Returns whether 2 is a good choice, and where resets end."""
    line = {t: row["steps_per_doubling"] for t, row in _line(rows).items() if row["steps_per_doubling"]}
    best = min(line, key=line.__getitem__)
    seen = f"{line[PAPERS]:.1f} steps per doubling; the best, {best:g}, takes {line[best]:.1f}"
    most = 2 / 3 * math.sqrt(convex.STEPS)
    right = all((row["resets"] > 0) == (t < most) for t, row in _line(rows).items())
    never = ", ".join(f"{t:g}" for t, row in sorted(_line(rows).items()) if not row["resets"])
    return [
        Verdict("a threshold of 2 is a good one", seen, line[PAPERS] < 1.05 * line[best]),
        Verdict(f"above (2/3) sqrt(n) = {most:.1f} there is no reset in n steps", f"none with {never}", right),
    ]
