"""Buckets: parameters that are stepped together, by one plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.native import clear, count_steps, read_gradients
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
    slots: list[Slot]  # in the order of the optimizer's parameters, as the next ones are
    params: list[Tensor]  # the optimizer's own
    states: list[dict[str, Any]]
    grads: list[Tensor | None]  # of the parameters, in a step; see Note [No new lists] in csrc/python/objects.h

    @classmethod
    def of(cls, plan: Plan, slots: list[Slot]) -> Bucket:
        """Returns the bucket of a plan with these slots."""
        params, states = [slot.parameter for slot in slots], [slot.state for slot in slots]
        return cls(plan, slots, params, states, [None] * len(slots))

    def read_gradients(self) -> Gradients:
        """Returns the gradients that the parameters have now, in ``grads``."""
        return self.grads, read_gradients(self.params, self.grads)

    def release_gradients(self) -> None:
        """Lets go of the gradients."""
        self.plan.release_gradients()
        clear(self.grads)

    def extend(self, new: list[Slot]) -> None:
        """Takes up more parameters."""
        for slot in new:
            at = bisect_left(self.slots, slot.index, key=_index)
            self.slots.insert(at, slot)
            self.params.insert(at, slot.parameter)
            self.states.insert(at, slot.state)
            self.grads.insert(at, None)
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
    for bucket, (grads, missing) in taken:
        params, states = bucket.params, bucket.states
        if missing or not all(active):
            taking = [grad is not None for grad in grads]
            if not all(active):
                taking = [took and active[slot.group] for took, slot in zip(taking, bucket.slots, strict=True)]
            params, states = list(compress(params, taking)), list(compress(states, taking))
        count_steps(states)
        torch.autograd.graph.increment_version(params)
        if has_dtensors:
            torch.autograd.graph.increment_version([local(p) for p in params if is_dtensor(p)])
