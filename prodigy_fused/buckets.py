"""Buckets: parameters that are stepped together, by one plan."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .low_precision import mode_of
from .options import Group
from .state import state_dtype
from .step import BucketKey, Plan, Slot


class Bucket(NamedTuple):
    """A plan and the parameters that it steps."""

    plan: Plan
    slots: list[Slot]  # in the order of the optimizer's parameters, as the next two are
    params: list[Tensor]
    states: list[dict[str, Any]]

    @classmethod
    def of(cls, plan: Plan, slots: list[Slot]) -> Bucket:
        """Returns the bucket of a plan with these slots."""
        return cls(plan, slots, [slot.param for slot in slots], [slot.state for slot in slots])


def key_of(backend: str, p: Tensor, group: Group) -> BucketKey:
    """Returns the key of the bucket that a parameter belongs to."""
    dtype, state_format = (str(t).removeprefix("torch.") for t in (p.dtype, state_dtype(p, group)))
    sampled, counted = group["slice_p"] > 1 and not group["frozen"], not group["frozen"]
    displaced = mode_of(p, group) == "displacement"
    return BucketKey(backend, str(p.device), dtype, state_format, sampled, displaced, counted)
