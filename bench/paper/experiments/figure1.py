"""Figure 1: every method on twelve data sets, multi-margin loss, all rows in every step, ten random starts.

Accuracies are of the average iterate, on the rows themselves, as in the paper. Methods that estimate start with d0 =
1e-6 and G = 0, DoG and DoWG with their own rule; Adagrad-norm is told D, and the best of five is shown for each set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import numpy as np
import torch

from paper import convex, data
from paper.experiments import Row
from paper.report import Verdict
from prodigy_fused.convex import AdagradNorm, DAdaptDA, DAdaptGD, DAdaptReset, DoG, DoWG, ProdigyDA, ProdigyGD

PART = "convex"
PACKAGES = data.PACKAGES
KEYS = ("set", "rows", "method", "seed")
NUMBERS = ("accuracy", "area", "loss", "d", "accuracies", "ds")
SEEDS = 10
SAMPLE = 2000  # rows, unless all are asked for
ADAGRAD, SOLUTION = "Adagrad-norm", "minimiser"
METHODS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "Prodigy GD": ProdigyGD,
    "Prodigy DA": ProdigyDA,
    "D-Adaptation GD": DAdaptGD,
    "D-Adaptation DA": DAdaptDA,
    "resetting": DAdaptReset,
    "DoG": DoG,
    "DoWG": DoWG,
    **{f"{ADAGRAD} {D}": (lambda params, D=D: AdagradNorm(params, D)) for D in (1, 3, 10, 30, 100)},
}
# As shown: Adagrad-norm once.
SHOWN = (*(name for name in METHODS if not name.startswith(ADAGRAD)), ADAGRAD)
PALETTE = ("#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#000000", "#9a9a9a")
COLOURS = dict(zip(SHOWN, PALETTE, strict=True))


def runs(full: bool) -> Iterator[Row]:
    """Yields every method from every start on every set, the smallest first."""
    for name, (size, _) in sorted(data.SIZES.items(), key=lambda pair: pair[1]):
        rows = size if full else min(size, SAMPLE)
        for seed in range(SEEDS):
            for method in (*METHODS, *([SOLUTION] if name in data.SOLVED else [])):
                yield {"set": name, "rows": rows, "method": method, "seed": seed}


def run(key: Row) -> Row:
    """Takes 1,000 steps with one method, or finds the nearest minimiser, whose distance is in the column d."""
    if key["method"] == SOLUTION:
        return _solution(key["set"], key["seed"])
    return convex.train(key["set"], key["rows"], key["seed"], METHODS[key["method"]])._asdict()


def _solution(name: str, seed: int) -> Row:
    from paper import exact  # here, because figures of rows that there are need no scipy

    x, y = data.convex_set(name, data.SIZES[name][0])
    start, minimum = convex.start(x.shape[1], data.SIZES[name][1], seed), exact.multi_margin(name)
    weight = exact.nearest(minimum, start)
    found = {"accuracy": convex.accuracy(weight, x, y), "loss": minimum.loss, "d": (weight - start).norm().item()}
    return {**dict.fromkeys(NUMBERS, ""), **found}


# -- what is shown: of each set the runs on the most rows, the best of Adagrad-norm --


def shown(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Returns the rows that are shown, by set and method: of the size of the data of which there are most runs, and of
    the larger one if they are equal (those of `--full` may be incomplete)."""
    found: dict[str, dict[str, list[Row]]] = {}
    for name in data.SIZES:
        own = [row for row in rows if row["set"] == name]
        counts = Counter(row["rows"] for row in own)
        most = max(counts, key=lambda size: (counts[size], size), default=0)
        methods: dict[str, list[Row]] = {}
        for row in own:
            if row["rows"] == most:
                methods.setdefault(row["method"], []).append(row)
        told = [methods.pop(method) for method in list(methods) if method.startswith(ADAGRAD)]
        if told:
            methods[ADAGRAD] = max(told, key=lambda same: mean(same, "accuracy"))
        if methods:
            found[name] = {method: methods[method] for method in SHOWN if method in methods}
    return found


def mean(rows: list[Row], number: str) -> float:
    """Returns the mean over the starts."""
    return fmean(row[number] for row in rows)


def distances(rows: list[Row]) -> dict[str, float]:
    """Returns D, the distance from the start to the nearest minimiser, where it is known: its mean over the starts."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == SOLUTION:
            found.setdefault(row["set"], []).append(row)
    return {name: mean(own, "d") for name, own in found.items()}


def _title(name: str, methods: dict[str, list[Row]]) -> str:
    """Returns a set's name, with a star for a stand-in, and what there is less of than asked for."""
    own = next(iter(methods.values()))
    rows = "" if own[0]["rows"] == data.SIZES[name][0] else f", {own[0]['rows']:,} rows"
    starts = "" if len(own) == SEEDS else f", {len(own)} starts"
    return f"{name}{'*' if name in data.STAND_INS else ''}{rows}{starts}"


def _panels(rows: list[Row], curve: str, label: str, scale: str, methods: tuple[str, ...]) -> plt.Figure:
    """Plots a curve of all methods in a panel per set: the mean over the starts, and a band from least to most."""
    sets = shown(rows)
    lines = -(-len(sets) // 4)
    figure, panels = plt.subplots(lines, 4, figsize=(12, 2.6 * lines), layout="constrained", squeeze=False)
    for axes, (name, own) in zip(panels.flat, sets.items(), strict=False):
        for method in (method for method in methods if method in own):
            drawn = np.array([row[curve] for row in own[method]])
            centre = np.exp(np.log(drawn).mean(0)) if scale == "log" else drawn.mean(0)
            axes.plot(convex.POINTS, centre, color=COLOURS[method], label=method, linewidth=1.2)
            axes.fill_between(convex.POINTS, drawn.min(0), drawn.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
        axes.set(title=_title(name, own), yscale=scale)
        axes.grid(alpha=0.25)
    for axes in list(panels.flat)[len(sets) :]:
        axes.remove()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(methods), frameon=False)
    for axes in list(panels.flat)[len(sets) - panels.shape[1] : len(sets)]:
        axes.set_xlabel("step")
    figure.supylabel(label)
    return figure


def plot(rows: list[Row]) -> dict[str, plt.Figure]:
    """Plots the accuracy of the average, and d, against the step."""
    estimating = tuple(method for method in SHOWN if method != ADAGRAD)
    estimates = _panels(rows, "ds", "d; dotted: D", "log", estimating)
    for axes, name in zip(estimates.axes, shown(rows), strict=False):
        if name in distances(rows):
            axes.axhline(distances(rows)[name], color="black", linestyle=":")
    return {"": _panels(rows, "accuracies", "accuracy of the average, %", "linear", SHOWN), "-d": estimates}


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Returns final accuracies, means over the steps, and d."""
    sets, known = shown(rows), distances(rows)

    def sheet(cell: Callable[[list[Row]], str]) -> list[list[str]]:
        lines = [[_title(name, own), *(cell(own.get(method, [])) for method in SHOWN)] for name, own in sets.items()]
        return [["set", *SHOWN], *lines]

    estimates = sheet(lambda own: f"{mean(own, 'd'):.3g}" if own else "")
    estimates = [
        [*line, f"{known[name]:.3g}" if name in known else ""]
        for line, name in zip(estimates, ["", *sets], strict=True)
    ]
    estimates[0][-1] = "D"
    return {
        "Final accuracy of the average, %; with the mean's standard error where it is 0.1 or more": sheet(_accuracy),
        "Area under the curve, the mean accuracy over the steps, %": sheet(
            lambda own: f"{100 * mean(own, 'area'):.1f}" if own else ""
        ),
        "d after the last step, and D where it is known": estimates,
    }


def _accuracy(own: list[Row]) -> str:
    if not own:
        return ""
    error = 100 * stdev(row["accuracy"] for row in own) / math.sqrt(len(own)) if len(own) > 1 else 0
    return f"{100 * mean(own, 'accuracy'):.1f}" + (f" ± {error:.1f}" if error >= 0.05 else "")


# -- the claims --


def _faster(sets: dict[str, dict[str, list[Row]]], method: str, other: str) -> tuple[int, int, str]:
    """Returns on how many sets, of how many, one area is larger than another, and this in words."""
    gains = [100 * (mean(own[method], "area") - mean(own[other], "area")) for own in sets.values() if other in own]
    won = sum(gain > 0 for gain in gains)
    return won, len(gains), f"{method} than {other} on {won} of {len(gains)} (area {fmean(gains):+.1f} points)"


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Returns the claims about Figure 1; faster is: with a larger area under the curve of the accuracy."""
    sets = shown(rows)
    pairs = {
        "Prodigy greatly outperforms D-Adaptation": [
            ("Prodigy GD", "D-Adaptation GD"),
            ("Prodigy DA", "D-Adaptation DA"),
        ],
        "D-Adaptation with resetting (dual averaging) does, too": [("resetting", "D-Adaptation DA")],
        "Prodigy is faster than DoG on 10 of 12 sets": [("Prodigy GD", "DoG"), ("Prodigy DA", "DoG")],
        "the form of gradient descent is better in practice": [("Prodigy GD", "Prodigy DA")],
        "(not in the paper) Prodigy is faster than DoWG": [("Prodigy GD", "DoWG")],
    }
    found = []
    for claim, each in pairs.items():
        counts = [_faster(sets, *pair) for pair in each]
        enough = [won >= 10 / 12 * of for won, of, _ in counts]
        holds = all(enough) or (None if any(enough) else False)
        found.append(Verdict(claim, "faster: " + "; ".join(words for *_, words in counts), holds))
    return [*found, _plateau(sets, distances(rows))]


def _plateau(sets: dict[str, dict[str, list[Row]]], known: dict[str, float]) -> Verdict:
    """Returns the verdict on d after the last step, relative to D; near is at least a third."""
    ratios = {name: mean(sets[name]["Prodigy GD"], "d") / D for name, D in known.items()}
    seen = ", ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())
    near = sum(ratio >= 1 / 3 for ratio in ratios.values())
    holds = near == len(ratios) or (None if 2 * near > len(ratios) else False)
    return Verdict("d plateaus close to D", f"Prodigy GD's d / D: {seen}", holds)
