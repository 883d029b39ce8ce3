"""A sum that does not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 1024  # elements that are summed in one go, and in their own precision


def stable_sum(t: Tensor) -> Tensor:
    """Returns the sum of all elements, 0-dim float64, in an order that does not depend on the number of threads.

    torch splits a long reduction to one number among its threads, but not one to many numbers. Only the sums of runs
    are converted to float64: given ``dtype=float64`` at once, torch would first copy all elements to float64.
    """
    while t.numel() > RUN:
        t = t.flatten()
        whole = t.numel() // RUN * RUN
        t = torch.cat([t[:whole].view(-1, RUN).sum(1).double(), t[whole:].sum(dtype=torch.float64)[None]])
    return t.sum(dtype=torch.float64)
