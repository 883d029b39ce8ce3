"""Weights of the steps: uniform, or larger for late steps by a power of k or exponentially?

`lambda_k` of Algorithm 1, which weighs both the steps and the average. "lad" is least absolute deviations, the mean of
|a x - b| over 200 random rows in ten dimensions, with noise in b or without; the others are data sets of Figure 1 (not
wine, where the minimum is reached). The gap is of the average after 1,000 steps, f - f*, with f* by linear programming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import matplotlib.pyplot as plt
import numpy as np
import torch

from paper import convex, data
from paper.experiments import Row
from paper.report import Verdict
from prodigy_fused.convex import ProdigyGD

PART = "convex"
PACKAGES = data.PACKAGES
KEYS = ("problem", "weights", "seed")
NUMBERS = ("gap", "d")
UNIFORM = "1"
WEIGHTS: dict[str, Callable[[int], float]] = {
    "k^(-1/2)": lambda k: (k + 1) ** -0.5,
    UNIFORM: lambda k: 1.0,
    "k^(1/2)": lambda k: (k + 1) ** 0.5,
    "k": lambda k: k + 1,
    "k^2": lambda k: (k + 1) ** 2,
    "0.999^(-k/2)": lambda k: 0.999 ** (-k / 2),
    "0.99^(-k/2)": lambda k: 0.99 ** (-k / 2),
}
LAD = {"lad, noise": 1.0, "lad, no noise": 0.0}
PROBLEMS = (*LAD, *(name for name in data.SOLVED if name != "wine"))
POLYNOMIAL, EXPONENTIAL, FALLING = "k^2", "0.99^(-k/2)", "k^(-1/2)"


def runs(full: bool) -> Iterator[Row]:
    """Yields every problem with ten starts; `full` is no more."""
    for problem in PROBLEMS:
        for weights in WEIGHTS:
            for seed in range(10):
                yield {"problem": problem, "weights": weights, "seed": seed}


def run(key: Row) -> Row:
    """Takes 1,000 steps of Algorithm 1."""
    from paper import exact  # here, because figures of rows that there are need no scipy

    problem, weights = key["problem"], WEIGHTS[key["weights"]]
    if problem not in LAD:
        size = data.SIZES[problem][0]
        found = convex.train(problem, size, key["seed"], lambda params: ProdigyGD(params, weights=weights))
        return {"gap": found.loss - exact.multi_margin(problem).loss, "d": found.d}
    draw = torch.Generator().manual_seed(key["seed"])
    a, solution, noise = (torch.randn(*shape, generator=draw).double() for shape in ((200, 10), (10,), (200,)))
    b = a @ solution + LAD[problem] * noise
    x = torch.nn.Parameter(torch.zeros_like(solution))
    optimizer = ProdigyGD([x], weights=weights)
    for _ in range(convex.STEPS):
        optimizer.zero_grad()
        (a @ x - b).abs().mean().backward()
        optimizer.step()
    gap = (a @ optimizer.average()[0] - b).abs().mean().item() - exact.absolute_deviations(a, b)
    return {"gap": gap, "d": optimizer.d}


def relative(rows: list[Row], number: str) -> dict[str, dict[str, float]]:
    """Returns a number relative to that with uniform weights from the same start, by problem and weights: the geometric
    mean over the starts."""
    values = {(row["problem"], str(row["weights"]), row["seed"]): row[number] for row in rows}
    found: dict[str, dict[str, float]] = {}
    for problem in PROBLEMS:
        seeds = sorted({seed for name, _, seed in values if name == problem})
        for weights in WEIGHTS:
            both = [(values.get((problem, weights, s)), values.get((problem, UNIFORM, s))) for s in seeds]
            ratios = [value / uniform for value, uniform in both if value is not None and uniform]
            if ratios:
                found.setdefault(problem, {})[weights] = float(np.exp(np.log(ratios).mean()))
    return found


def plot(rows: list[Row]) -> dict[str, plt.Figure]:
    """Plots the gap and the estimate, relative to those with uniform weights."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, number, title in zip(panels, ("gap", "d"), ("gap after 1,000 steps", "d after 1,000 steps"), strict=True):
        for (problem, ratios), marker in zip(relative(rows, number).items(), "ov^sDP", strict=False):
            axes.plot(list(ratios), list(ratios.values()), marker, label=problem, alpha=0.8)
        axes.axhline(1, color="grey", linestyle=":")
        axes.set(title=f"{title}, to uniform weights", yscale="log")
        axes.set_yticks([0.5, 0.7, 1, 1.5, 2, 3], ["0.5", "0.7", "1", "1.5", "2", "3"])
        axes.minorticks_off()
        axes.tick_params(axis="x", rotation=30)
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return {"": figure}


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Returns the same figures."""

    def sheet(number: str) -> list[list[str]]:
        found = relative(rows, number)
        lines = [[problem, *(f"{ratios.get(name, 1):.2f}" for name in WEIGHTS)] for problem, ratios in found.items()]
        return [["problem", *WEIGHTS], *lines]

    return {"Gap of the average, to that with uniform weights": sheet("gap"), "d, to the same": sheet("d")}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Returns whether weights help, and where they come from."""
    gaps, ds = relative(rows, "gap"), relative(rows, "d")

    def better(weights: str) -> tuple[int, str]:
        ratios = [own[weights] for own in gaps.values()]
        won = sum(ratio < 1 for ratio in ratios)
        return won, f"{weights}: a smaller gap on {won} of {len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}"

    growing = [better(POLYNOMIAL), better(EXPONENTIAL)]
    falling, words = better(FALLING)
    faster = [own[POLYNOMIAL] for own in ds.values()]
    return [
        Verdict(
            "polynomial or exponential weights do better than uniform ones in practice",
            "; ".join(words for _, words in growing),
            all(won == len(gaps) for won, _ in growing) or (None if any(won for won, _ in growing) else False),
        ),
        Verdict("weights that fall, which the theorem excludes, do worse", words, falling == 0),
        Verdict(
            "because d adapts faster",
            f"d with {POLYNOMIAL}: {min(faster):.2f} to {max(faster):.2f} of that with uniform weights",
            all(ratio > 1.1 for ratio in faster),
        ),
    ]
