"""Figure 2 in small: convolutional networks on 5,000 digits of MNIST, and how much each method's setting matters.

The paper: VGG11 and ResNet-50 on CIFAR-10. As there: cosine schedule, no weight decay, nothing tuned but Adam's
learning rate, DoG and L-DoG with the better of the last iterate and the average, and no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import matplotlib.pyplot as plt

from paper.experiments import Row
from paper.networks import comparison as c
from paper.networks.tasks import convolutional
from paper.report import Verdict

PART = "networks"
PACKAGES = ("mlxtend",)
KEYS = ("network", "method", "value", "seed")
NUMBERS = c.NUMBERS
NETWORKS = ("VGG", "ResNet")
METHODS = (*c.ADAPTIVE, "DoG", "L-DoG")
# Other settings than the default, one seed: Prodigy's d_coef, D-Adapt Adam's lr, and what DoG's first distance is
# multiplied by.
OTHERS = {"Prodigy": (0.25, 0.5, 2, 4), "D-Adapt Adam": (0.25, 0.5, 2, 4), "DoG": (0.01, 100)}
SETTINGS = {c.ADAM: "lr", "Prodigy": "d_coef", "D-Adapt Adam": "lr", "DoG": "d0 / its rule's"}


def runs(full: bool) -> Iterator[Row]:
    """Yields the runs, seed by seed, and then the other settings; `full` is no more."""
    compared = [{"network": network, **key} for network in NETWORKS for key in c.runs(METHODS)]
    yield from sorted(compared, key=lambda key: key["seed"])
    for network in NETWORKS:
        for method, values in OTHERS.items():
            for value in values:
                yield {"network": network, "method": method, "value": value, "seed": 0}


def run(key: Row) -> Row:
    """Trains a network; the score is the accuracy on 1,000 digits that it was not trained on, in per cent."""
    return c.record(convolutional(key["network"]), key)


def _best_iterate(rows: list[Row]) -> list[Row]:
    """Returns the rows with the better of both scores, of the last iterate and of the average, as in the paper."""
    return [{**row, "score": max(row["score"], row["average_score"])} for row in rows]


def _tasks(rows: list[Row]) -> dict[str, c.Methods]:
    own = {network: [row for row in rows if row["network"] == network] for network in NETWORKS}
    compared = {network: c.compared(_best_iterate(each), "%") for network, each in own.items() if each}
    return {network: methods for network, methods in compared.items() if methods}


def plot(rows: list[Row]) -> dict[str, plt.Figure]:
    """Plots losses and d against the step, and the final accuracy against each method's setting."""
    curves = {
        "test loss": ("tests", "log"),
        "training loss": ("losses", "log"),
        "d (Adam: lr)": ("ds", "log"),
    }
    found = _tasks(rows)
    return {"": c.panels(found, curves), "-settings": _settings(rows)} if found else {}


def _settings(rows: list[Row]) -> plt.Figure:
    size = {"figsize": (10.8, 4.6), "layout": "constrained", "sharey": "row"}
    figure, grid = plt.subplots(len(NETWORKS), len(SETTINGS), **size)
    for line, network in zip(grid, NETWORKS, strict=True):
        for axes, (method, setting) in zip(line, SETTINGS.items(), strict=True):
            found = _by_value(rows, network, method)
            colour = c.COLOURS[c.TUNED if method == c.ADAM else method]
            axes.plot(list(found), list(found.values()), "o-", color=colour)
            axes.set(title=f"{network}: {method}", xlabel=setting, xscale="log")
            axes.grid(alpha=0.25)
        line[0].set_ylabel("accuracy, %")
    return figure


def _by_value(rows: list[Row], network: str, method: str) -> dict[float, float]:
    """Returns the accuracy by the setting, of the seed that all settings have."""
    own = [row for row in _best_iterate(rows) if (row["network"], row["method"], row["seed"]) == (network, method, 0)]
    return {row["value"]: row["score"] for row in sorted(own, key=itemgetter("value"))}


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Returns accuracies, losses and d of the compared methods, and accuracies by setting."""
    lines = []
    for network, methods in _tasks(rows).items():
        for method in (method for method in c.COLOURS if method in methods):
            own = methods[method]
            name = f"{method}, lr {own[0]['value']:g}" if method == c.TUNED else method
            d = f"{c.mean(own, 'd'):.2g}"
            cells = [c.cell(own, "score", 2), c.cell(own, "test_loss", 3), c.cell(own, "train_loss", 3), d]
            lines.append([f"{network}, {name}", *cells])
    settings = [
        [f"{network}, {method}: {setting}", ", ".join(f"{v:g}: {score:.1f}" for v, score in found.items())]
        for network in NETWORKS
        for method, setting in SETTINGS.items()
        if (found := _by_value(rows, network, method))
    ]
    return {
        "Digits, mean ± standard deviation over the seeds": [
            ["", "test accuracy, %", "test loss", "training loss", "d, of Adam lr"],
            *lines,
        ],
        "Test accuracy by the setting, seed 0, %": [["", "setting: accuracy"], *settings],
    }


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Returns the claims about Figure 2."""
    tasks = {network: (methods, "%") for network, methods in _tasks(rows).items()}
    return [
        c.close("Prodigy's test accuracy is close to tuned Adam's", tasks, c.TUNED, margin=True),
        _closes_gap("and closes the gap that D-Adapt Adam leaves", tasks),
        _larger("by a larger estimate of the step size", rows, "Prodigy", "D-Adapt Adam"),
        _larger("DoG's estimate is larger than Prodigy's", rows, "DoG", "Prodigy"),
        c.close("(not in the paper's words) Prodigy is better than DoG", tasks, "DoG", margin=False),
        c.close("(nor this) Prodigy is better than L-DoG", tasks, "L-DoG", margin=False),
    ]


def _closes_gap(claim: str, tasks: dict[str, tuple[c.Methods, str]]) -> Verdict:
    """Judges where D-Adapt Adam is behind tuned Adam by more than what counts as close; elsewhere there is no gap."""
    gaps = {
        network: task
        for network, task in tasks.items()
        if {"D-Adapt Adam", c.TUNED} <= set(task[0])
        and c.behind(task[0], "D-Adapt Adam", c.TUNED, task[1]) > c.CLOSE[task[1]]
    }
    if gaps:
        return c.close(claim, gaps, c.TUNED, margin=True)
    return Verdict(claim, "no gap to close: D-Adapt Adam is close to tuned Adam, or ahead of it, on each", None)


def _larger(claim: str, rows: list[Row], method: str, other: str) -> Verdict:
    """Judges by all seeds: a ratio that is above 1 with some of them only is neither."""
    ratios = {
        network: [a["d"] / b["d"] for a, b in zip(own[method], own[other], strict=False)]
        for network, own in _tasks(rows).items()
        if {method, other} <= set(own)
    }
    seen = "; ".join(f"{network}: {min(each):.2g} to {max(each):.2g} times" for network, each in ratios.items())
    larger = [min(each) > 1 for each in ratios.values()]
    holds = (all(larger) or (None if any(larger) else False)) if larger else None
    return Verdict(claim, f"d of {method} over that of {other}: {seen}", holds)
