"""Sums that do not depend on the number of threads, nor on what else is summed in the same operation."""

from __future__ import annotations

import torch
from torch import Tensor

ROW = 1024  # elements that are summed in one go, and in their own precision
# On a GPU torch shapes the blocks of a reduction by the number of its results, up to this many.
_LEAST_ROWS = 32
_LEAST_EXPONENT = -960  # so that a unit is no subnormal number


def stable_sum(t: Tensor) -> Tensor:
    """Returns the sum of all elements, 0-dim float64, in an order that does not depend on the number of threads.

    torch splits a long reduction to one number among its threads, but not one to many numbers. Only the sums of rows
    are converted to float64: given ``dtype=float64`` at once, torch would first copy all elements to float64.
    """
    while t.numel() > ROW:
        t = t.flatten()
        whole = t.numel() // ROW * ROW
        t = torch.cat([t[:whole].view(-1, ROW).sum(1).double(), t[whole:].sum(dtype=torch.float64)[None]])
    return t.sum(dtype=torch.float64)


def row_sums(t: Tensor) -> Tensor:
    """Returns the sum, in float64, of each ``ROW`` elements of a flat tensor, as if zeros followed the last ones; a
    row's sum does not depend on the other rows."""
    whole = t.numel() // ROW * ROW
    if t.is_cpu and whole == t.numel() > 0:
        return t.view(-1, ROW).sum(1).double()
    if t.is_cpu:
        parts = [t[:whole]] if whole else []
        if whole < t.numel() or not parts:
            parts.append(torch.constant_pad_nd(t[whole:], (0, whole + ROW - t.numel())))
        sums = [part.view(-1, ROW).sum(1) for part in parts]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).double()
    missing = max(whole + ROW * (whole < t.numel()), _LEAST_ROWS * ROW) - t.numel()
    return (torch.constant_pad_nd(t, (0, missing)) if missing else t).view(-1, ROW).sum(1).double()


def sums_of_any_order(rows: Tensor) -> Tensor:
    """Returns the sum of each row of a float64 matrix, which does not depend on the order of its elements."""
    size = rows.abs().amax(1, keepdim=True)
    # Of the units of a fixed-point number, which is good to 2^-62 of the sum's bound, every order has the same sum.
    bits = 62 - rows.shape[1].bit_length()
    unit = torch.exp2((torch.frexp(size).exponent.clamp_(min=_LEAST_EXPONENT) - bits).double())
    total = (rows / unit).round_().to(torch.int64).sum(1, keepdim=True) * unit
    return torch.where(size.isfinite(), total, rows.sum(1, keepdim=True)).squeeze(1)
