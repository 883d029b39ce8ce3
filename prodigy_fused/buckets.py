"""Buckets: parameters that are stepped together, by one plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.native import count_steps
from .dtensor import is_dtensor, local
from .hyper import Hyper
from .low_precision import mode_of
from .options import Group
from .state import state_format
from .step import BucketKey, Plan, Slot

_index = attrgetter("index")
Gradients = tuple[list[Tensor | None], int]  # of the tensors of a plan, and how many of them are None


def merged(slots: list[Slot], new: list[Slot]) -> list[Slot]:
    """Returns both in the order of the parameters. A few new ones cost little, however many slots there are."""
    if len(new) != 1:
        return sorted([*slots, *new], key=_index)
    at = bisect_left(slots, new[0].index, key=_index)
    return [*slots[:at], *new, *slots[at:]]


class Bucket(NamedTuple):
    """A plan and the parameters that it steps."""

    plan: Plan
    slots: list[Slot]  # in the order of the optimizer's parameters, as the next two are
    params: list[Tensor]  # the optimizer's own
    states: list[dict[str, Any]]

    @classmethod
    def of(cls, plan: Plan, slots: list[Slot]) -> Bucket:
        """Returns the bucket of a plan with these slots."""
        return cls(plan, slots, [slot.parameter for slot in slots], [slot.state for slot in slots])

    def extend(self, new: list[Slot]) -> None:
        """Takes up more parameters."""
        for slot in new:
            at = bisect_left(self.slots, slot.index, key=_index)
            self.slots.insert(at, slot)
            self.params.insert(at, slot.parameter)
            self.states.insert(at, slot.state)
        self.plan.extend(self.slots)


def key_of(backend: str, p: Tensor, group: Group, counted: bool) -> BucketKey:
    """Returns the key of the bucket that a parameter belongs to.

    Args:
        p: of a DTensor, this rank's tensor.
        counted: whether this rank's elements enter the sums.
    """
    dtype = str(p.dtype).removeprefix("torch.")
    sampled = group["slice_p"] > 1 and not group["frozen"]
    mode = mode_of(p, group)
    kept = mode == "displacement", mode == "24bit"
    of_state = state_format(p, group), sampled, *kept
    return BucketKey(backend, str(p.device), dtype, *of_state, group["frozen"], counted)


def mark(taken: Iterable[tuple[Bucket, Gradients]], hypers: Sequence[Hyper], has_dtensors: bool) -> None:
    """Counts a step in the state of each parameter that took it, and tells autograd what was written."""
    active = [isinstance(h.lr, Tensor) or h.lr > 0 for h in hypers]
    params: list[Tensor] = []
    states: list[dict[str, Any]] = []
    for bucket, (grads, missing) in taken:
        taking = bucket
        if missing or not all(active):
            pairs = zip(bucket.slots, grads, strict=True)
            taking = Bucket.of(bucket.plan, [slot for slot, g in pairs if g is not None and active[slot.group]])
        params += taking.params
        states += taking.states
    count_steps(states)
    parts = [local(p) for p in params if is_dtensor(p)] if has_dtensors else []
    torch.autograd.graph.increment_version([*params, *parts])
