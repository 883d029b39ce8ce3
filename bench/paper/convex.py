"""What the convex experiments share: the multi-margin loss over all rows, and a run of a method on it.

The loss of Crammer and Singer's kind in torch's form: f(W) = mean over rows, and over classes j other than the row's
own y, of max(0, 1 - s_y + s_j), s = W x; `torch.nn.MultiMarginLoss`. W starts at random, N(0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import shared  # finds the package  # noqa: F401
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import multi_margin_loss

from paper import data

STEPS = 1000
# The iterations at which curves have a point: often while the estimate grows, and to the end.
POINTS = (0, 25, 50, 75, 100, 150, 200, 300, 400, 500, 600, 800, 1000)
EVERY = 25  # iterations between evaluations, of which the area is made


class Run(NamedTuple):
    """What a run found. Accuracies are of the average iterate, shares of the rows."""

    accuracy: float
    area: float  # mean accuracy over the iterations
    loss: float
    d: float
    accuracies: list[float]  # in per cent, at POINTS
    ds: list[float]  # at POINTS


def start(features: int, classes: int, seed: int) -> Tensor:
    """Returns the random W0, float64, of shape (classes, features)."""
    return torch.randn(classes, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(name: str, rows: int, seed: int, method: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Run:
    """Minimises the loss on a data set.

    Args:
        name: of the set; see `data.convex_set`.
        rows: of the set, that are used.
        seed: of the start.
        method: makes the optimizer, one of `prodigy_fused.convex`, from the parameters.

    Returns:
        What was found after STEPS steps.
    """
    x, y = data.convex_set(name, rows)
    weight = Parameter(start(x.shape[1], int(y.max()) + 1, seed))
    optimizer, accuracies, ds = method([weight]), {}, {}
    for k in range(STEPS + 1):
        if k % EVERY == 0 or k in POINTS:
            accuracies[k], ds[k] = accuracy(optimizer.average()[0], x, y), optimizer.d
        if k < STEPS:
            optimizer.zero_grad()
            multi_margin_loss(x @ weight.T, y).backward()
            optimizer.step()
    loss = multi_margin_loss(x @ optimizer.average()[0].T, y).item()
    area = math.fsum(accuracies[k] for k in range(EVERY, STEPS + 1, EVERY)) * EVERY / STEPS
    percent = [round(100 * accuracies[k], 1) for k in POINTS]
    return Run(accuracies[STEPS], area, loss, optimizer.d, percent, [float(f"{ds[k]:.3g}") for k in POINTS])


def accuracy(weight: Tensor, x: Tensor, y: Tensor) -> float:
    """Returns the share of the rows whose class has the largest score."""
    return ((x @ weight.detach().T).argmax(1) == y).double().mean().item()
