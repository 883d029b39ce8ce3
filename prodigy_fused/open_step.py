"""A step whose gradients come one by one, each of which may be freed at once (release.py).

Note [Gradients one by one]
Only the two sums need all parameters. So phase 1 of each parameter can be taken as soon as its gradient is there, and
moves m, v, s and x with the old d as it always does. When the last one is in, the sums are added up, and phase 2 gives
x the reference's value, for which it needs no gradient (but with beta1 = 0, where they are kept). Each chunk's part of
the sums has its fixed place, and they are added in the fixed order: the bits are those of the ordinary step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket
from .dtensor import local, ready
from .hyper import Hyper
from .options import Group
from .plans import PlanSet
from .redistribute import differs, local_gradients
from .step import Step
from .tensors import check_gradient, describe


class OpenStep:
    """A step between its first gradient and its last.

    Args:
        plans: built; they may grow.
        step: its scalars, which do not change any more.
        hypers: of the groups.
    """

    def __init__(self, plans: PlanSet, step: Step, hypers: Sequence[Hyper]) -> None:
        self.plans, self.step, self.hypers = plans, step, hypers
        self._created = list(plans.created)  # that may turn out to have no gradient
        self._indices = {id(p): index for index, p in enumerate(plans.params)}
        self._waiting: dict[int, Tensor] = {}  # gradients that have to wait for the others
        # Of what has been updated, what phase 2 takes for the gradient: a stand-in that is laid out as it was.
        self._stand_ins: dict[int, Tensor] = {}
        self._seen: dict[int, weakref.ref[Tensor]] = {}  # the gradients
        for bucket in plans.plans:
            bucket.plan.begin(self._on_device_of(bucket))
        self._look()

    def _on_device_of(self, bucket: Bucket) -> Step:
        return self.step.to(bucket.plan.sums.device)

    def _look(self) -> None:
        """Notes where each parameter is."""
        self._places: dict[int, tuple[Bucket, int, Step]] = {}
        for bucket in self.plans.plans:
            on_device = self._on_device_of(bucket)
            self._places |= {slot.index: (bucket, at, on_device) for at, slot in enumerate(bucket.slots)}

    def take(self, p: Tensor, grad: Tensor) -> None:
        """Updates a parameter with its gradient, which is of no more use afterwards.

        Raises:
            ValueError: not a parameter of this optimizer, or a bad gradient.
            RuntimeError: a second gradient in the same step; a parameter on another device than before it.
        """
        index = self._indices.get(id(p))
        if index is None:
            raise ValueError(not_ours(p))
        if index in self._seen:
            raise RuntimeError(second_gradient(index, p))
        check_gradient(index, p, grad)
        self._seen[index] = weakref.ref(grad)
        if differs(p, grad):  # it takes a collective, and ranks may be at different parameters
            self._waiting[index] = grad
        else:
            self._update(index, ready(local(grad)))

    def _update(self, index: int, grad: Tensor) -> None:
        if index not in self._places:
            self._arrive(index)
        bucket, at, step = self._places[index]
        if not bucket.plan.unchanged_at(at):
            self._mend([bucket])
        bucket.plan.update_one(step, at, grad)
        has_momentum = self.hypers[self.plans.owners[index]].beta1 > 0
        self._stand_ins[index] = self._stand_in(index, grad.dtype) if has_momentum else grad
        torch.autograd.graph.increment_version([self.plans.locals[index]])

    def _stand_in(self, index: int, dtype: torch.dtype) -> Tensor:
        """Returns a tensor that is laid out as a gradient of this dtype was, if there is one."""
        p, v = self.plans.params[index], self.plans.states[self.plans.params[index]]["exp_avg_sq"]
        mine = self.plans.locals[index].detach()
        return v if dtype not in (mine.dtype, p.dtype) and v.dtype == dtype else mine

    def _arrive(self, index: int) -> None:
        """Takes up a parameter with a first gradient."""
        so_far = self._partials(self.plans.plans)
        self.plans.take_up([index])
        self.plans.waiting.remove(index)
        self.plans.built = False
        self.plans.build()
        self._put_back(self.plans.plans, so_far)
        self._look()

    def _mend(self, buckets: list[Bucket]) -> None:
        """Follows tensors that were moved since the step began, as when blocks are swapped in and out of a device."""
        so_far = self._partials(buckets)
        if not self.plans.mend(buckets):
            raise RuntimeError(
                f"parameters like {describe(buckets[0].slots[0].index, buckets[0].slots[0].param)} went to another "
                "device or dtype, or got another state, in the middle of a step: call step() before that"
            )
        self._put_back(buckets, so_far)

    def _partials(self, buckets: list[Bucket]) -> dict[int, Any]:
        return {id(bucket.plan): bucket.plan.partials() for bucket in buckets}

    def _put_back(self, buckets: list[Bucket], so_far: dict[int, Any]) -> None:
        for bucket in buckets:
            bucket.plan.begin(self._on_device_of(bucket))
            if id(bucket.plan) in so_far:
                bucket.plan.put_partials(so_far[id(bucket.plan)])

    def close(self, groups: list[Group], states: dict[Tensor, Any]) -> Tensor:
        """Updates all parameters that still have a gradient; returns the total of the sums.

        Raises:
            ValueError: a bad gradient.
            RuntimeError: a second gradient; parameters or state were replaced.
        """
        plans = self.plans
        if not plans.has(groups, states):
            raise RuntimeError("parameters or their state were replaced in the middle of a step")
        for index, seen in self._seen.items():
            if plans.params[index].grad is not None and plans.params[index].grad is not seen():
                raise RuntimeError(second_gradient(index, plans.params[index]))
        rest = [index for index in range(len(plans.params)) if index not in self._stand_ins]
        grads = [self._waiting.get(index, plans.params[index].grad) for index in rest]
        for index, grad in zip(rest, grads, strict=True):
            if grad is not None:
                check_gradient(index, plans.params[index], grad)
        for index, mine in zip(rest, local_gradients([plans.params[i] for i in rest], grads), strict=True):
            if mine is not None:
                self._update(index, mine)
        moved = plans.moved()
        if moved:
            self._mend(moved)
        stand_ins = [[self._stand_ins.get(slot.index) for slot in bucket.slots] for bucket in plans.plans]
        plans.load([(own, sum(t is None for t in own)) for own in stand_ins])
        for bucket in plans.plans:
            bucket.plan.add_up(self._on_device_of(bucket))
        return plans.total(self.step)

    def without_gradients(self) -> list[Tensor]:
        """Returns the parameters that were expected to have a gradient, their first, and had none."""
        return [self.plans.params[index] for index in self._created if index not in self._stand_ins]


def not_ours(p: Tensor) -> str:
    """Returns what to say of a parameter that the optimizer did not have when the step began."""
    return f"a parameter of shape {tuple(p.shape)} is not one of this optimizer"


def second_gradient(index: int, p: Tensor) -> str:
    """Returns what to say of a parameter that has one."""
    return (
        f"{describe(index, p)} got a second gradient before step(): released gradients cannot be accumulated. Call "
        "zero_grad() and step() after every backward, or do without gradient release. (With a module that is used "
        "twice, checkpoint(use_reentrant=True) computes two: use_reentrant=False)"
    )
