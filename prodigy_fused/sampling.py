"""A warning where the samples of ``slice_p`` are whole columns: where it has a factor in common with a matrix's width.

Sample i is element ``i * slice_p``, in column ``i * slice_p % width``: without a common factor every column has its
turn; with the factor f only every f-th one has, in all rows, and d is as far off as those columns differ from the rest
(docs/memory.md, "A sample of the parameters").
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import count
from math import gcd

from .step import Slot
from .tensors import describe

# Fewer elements than that are no matter, nor is a smaller share of those that enter the same estimate.
LEAST_ELEMENTS, LEAST_SHARE = 1024, 0.1


def width(slot: Slot) -> int:
    """Returns the number of columns of a parameter; 1 if it is no matrix. Dimensions of size 1 do not count."""
    sizes = [size for size in slot.parameter.shape if size > 1]
    return sizes[-1] if len(sizes) > 1 else 1


def fitting(slice_p: int, widths: Collection[int]) -> int:
    """Returns the odd number above 1, nearest to ``slice_p``, that has no factor in common with any of ``widths``."""
    candidates = (p for distance in count() for p in (slice_p - distance, slice_p + distance))
    return next(p for p in candidates if p > 1 and p % 2 and all(gcd(p, n) == 1 for n in widths))


def elements(slots: Iterable[Slot]) -> Counter[int]:
    """Returns how many elements enter each estimate, as far as they are of these parameters."""
    found = Counter[int]()
    for slot in slots:
        found[slot.estimate] += slot.parameter.numel()
    return found


def in_columns(slots: Collection[Slot]) -> list[Slot]:
    """Returns the parameters of which only some columns are sampled, where they matter to their estimate."""
    found = [slot for slot in slots if not slot.frozen and gcd(slot.slice_p, width(slot)) > 1]
    every, some = elements(slots), elements(found)
    return [slot for slot in found if some[slot.estimate] >= max(LEAST_ELEMENTS, LEAST_SHARE * every[slot.estimate])]


def warn_of_columns(slots: Collection[Slot], created: Iterable[int]) -> None:
    """Warns of parameters of which only some columns are sampled, and says which ``slice_p`` samples all.

    Not where that was so before: either it has been said, or a checkpoint decides on ``slice_p``.

    Args:
        slots: all parameters that are stepped.
        created: the indices of those whose state is new.
    """
    new = {*created}
    found = in_columns(slots) if new else []
    if not found or in_columns([slot for slot in slots if slot.index not in new]):
        return
    slot, more = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
    factor, p = gcd(slot.slice_p, width(slot)), fitting(slot.slice_p, {width(slot) for slot in slots})
    warnings.warn(
        f"{describe(slot.index, slot.parameter)}{more}: slice_p={slot.slice_p} and the last dimension have the factor "
        f"{factor} in common, so that only one in {factor} columns is sampled, and d may be far off; slice_p={p} would "
        "sample all columns",
        stacklevel=2,
    )
