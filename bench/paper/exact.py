"""Exact minima by linear programming: of the multi-margin loss on small data sets, with the minimiser nearest to a
start, whose distance is the D of the theory; and of least absolute deviations. Needs scipy, and is imported late."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog, nnls
from scipy.sparse import csr_matrix, hstack, identity
from torch import Tensor

from paper import data

TOLERANCE = 1e-7  # of the dual solution, which is from 0 to 1


class Minimum(NamedTuple):
    """The minimum of a loss, and its minimisers: the w with ``left @ w >= right``."""

    loss: float
    left: np.ndarray
    right: np.ndarray


@functools.lru_cache(maxsize=2)
def multi_margin(name: str) -> Minimum:
    """Returns the minimum of the multi-margin loss on a whole data set; w is W of shape (classes, features), flat.

    Raises:
        FileNotFoundError: the package with the data is not installed.
    """
    x, y = (each.numpy() for each in data.convex_set(name, data.SIZES[name][0]))
    rows, classes = len(x), int(y.max()) + 1
    # A margin (w_y - w_j) x of each row and class j other than its own y; the loss is the mean of max(0, 1 - margin).
    row, other = np.nonzero(np.arange(classes) != y[:, None])
    pair = np.arange(len(row))
    margins = np.zeros((len(row), classes, x.shape[1]))
    margins[pair, y[row]] = x[row]
    margins[pair, other] = -x[row]
    margins = margins.reshape(len(row), -1)
    loss, slopes = _hinges(margins, 1 / (rows * classes))
    # Minimisers have the same slopes: 1 where the margin is at most 1, 0 where at least 1, between them if it is 1.
    most, least = margins[slopes > TOLERANCE], margins[slopes < 1 - TOLERANCE]
    return Minimum(loss, np.vstack([least, -most]), np.concatenate([np.ones(len(least)), -np.ones(len(most))]))


def _hinges(margins: np.ndarray, share: float) -> tuple[float, np.ndarray]:
    """Minimises ``share * sum max(0, 1 - margins @ w)``; returns the minimum, and the slopes at every minimiser."""
    pairs, size = margins.shape
    costs = np.concatenate([np.zeros(size), np.full(pairs, share)])
    bounds = [(None, None)] * size + [(0, None)] * pairs
    left = hstack([-csr_matrix(margins), -identity(pairs)]).tocsr()
    found = linprog(costs, left, -np.ones(pairs), bounds=bounds, method="highs")
    return float(found.fun), -found.ineqlin.marginals / share


def nearest(minimum: Minimum, start: Tensor) -> Tensor:
    """Returns the minimiser nearest to a start, in its shape: Lawson and Hanson's least distance programming."""
    w = start.double().flatten().numpy()
    right = minimum.right - minimum.left @ w
    scale = np.abs(right).max()
    system = np.vstack([minimum.left.T, right[None] / scale])
    target = np.zeros(len(system))
    target[-1] = 1
    rest = system @ nnls(system, target, maxiter=100 * system.shape[1])[0] - target
    return torch.from_numpy(w - rest[:-1] / rest[-1] * scale).reshape(start.shape)


def absolute_deviations(a: Tensor, b: Tensor) -> float:
    """Returns the minimum over x of the mean of ``|a x - b|``."""
    rows, size = a.shape
    left = np.block([[a.numpy(), -np.eye(rows)], [-a.numpy(), -np.eye(rows)]])
    costs = np.concatenate([np.zeros(size), np.full(rows, 1 / rows)])
    right = np.concatenate([b.numpy(), -b.numpy()])
    return float(linprog(costs, left, right, bounds=(None, None), method="highs").fun)
