"""A step whose gradients come one by one, each of which may be freed at once (release.py).

Note [Gradients one by one]
Only the two sums need all parameters. So phase 1 of each parameter can be taken as soon as its gradient is there, and
moves m, v, s and x with the old d as it always does. When the last one is in, the sums are added up, and phase 2 gives
x the reference's value, for which it needs no gradient (but with beta1 = 0, where they are kept). Each chunk's part of
the sums has its fixed place, and they are added in the fixed order: the bits are those of the ordinary step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtensor import local, ready
from .hyper import Hyper
from .plans import PlanSet
from .redistribute import differs, local_gradients
from .step import Plan, Step
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
        self._indices = {id(p): index for index, p in enumerate(plans.params)}
        self._kept: dict[int, Tensor] = {}  # gradients that have to wait for the others
        # Of what has been updated, what phase 2 takes for the gradient: a stand-in that is laid out as it was.
        self._taken: dict[int, Tensor] = {}
        for bucket in plans.plans:
            bucket.plan.begin(step.to(bucket.plan.sums.device))
        self._look()

    def _look(self) -> None:
        """Notes where each parameter is."""
        self._places: dict[int, tuple[Plan, int, Step]] = {}
        for bucket in self.plans.plans:
            on_device = self.step.to(bucket.plan.sums.device)
            self._places |= {slot.index: (bucket.plan, at, on_device) for at, slot in enumerate(bucket.slots)}

    def take(self, p: Tensor) -> None:
        """Updates a parameter with its gradient, which is of no more use afterwards.

        Raises:
            ValueError: not a parameter of this optimizer, or a bad gradient.
            RuntimeError: a second gradient in the same step.
        """
        index = self._indices.get(id(p))
        if index is None:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is not one of this optimizer")
        grad = p.grad
        if grad is None:
            return
        if index in self._taken or index in self._kept:
            raise RuntimeError(
                f"{describe(index, p)} got a second gradient before step(): gradients that are released cannot be "
                "accumulated; call step() after every backward, or do without gradient release"
            )
        check_gradient(index, p, grad)
        if differs(p, grad):  # it takes a collective, and ranks may be at different parameters
            self._kept[index] = grad
        else:
            self._update(index, ready(local(grad)))

    def _update(self, index: int, grad: Tensor) -> None:
        if index not in self._places:
            self._arrive(index)
        plan, at, step = self._places[index]
        plan.update_one(step, at, grad)
        has_momentum = self.hypers[self.plans.owners[index]].beta1 > 0
        self._taken[index] = self._stand_in(index, grad.dtype) if has_momentum else grad
        torch.autograd.graph.increment_version([self.plans.locals[index]])

    def _stand_in(self, index: int, dtype: torch.dtype) -> Tensor:
        """Returns a tensor that is laid out as a gradient of this dtype was, if there is one."""
        p, v = self.plans.params[index], self.plans.states[self.plans.params[index]]["exp_avg_sq"]
        mine = self.plans.locals[index].detach()
        return v if dtype not in (mine.dtype, p.dtype) and v.dtype == dtype else mine

    def _arrive(self, index: int) -> None:
        """Takes up a parameter with a first gradient."""
        so_far = {id(bucket.plan): bucket.plan.partials() for bucket in self.plans.plans}
        self.plans.take_up([index])
        self.plans.waiting.remove(index)
        self.plans.built = False
        self.plans.build()
        for bucket in self.plans.plans:
            bucket.plan.begin(self.step.to(bucket.plan.sums.device))
            if id(bucket.plan) in so_far:
                bucket.plan.put_partials(so_far[id(bucket.plan)])
        self._look()

    def close(self) -> Tensor:
        """Updates all parameters that still have a gradient; returns the total of the sums."""
        plans = self.plans
        rest = [index for index in range(len(plans.params)) if index not in self._taken]
        grads = [self._kept.get(index, plans.params[index].grad) for index in rest]
        for index, grad in zip(rest, grads, strict=True):
            if grad is not None:
                check_gradient(index, plans.params[index], grad)
        params = [plans.params[index] for index in rest]
        for index, mine in zip(rest, local_gradients(params, grads), strict=True):
            if mine is not None:
                self._update(index, mine)
        stand_ins = [[self._taken.get(slot.index) for slot in bucket.slots] for bucket in plans.plans]
        plans.load([(own, sum(t is None for t in own)) for own in stand_ins])
        for bucket in plans.plans:
            bucket.plan.add_up(self.step.to(bucket.plan.sums.device))
        return plans.total(self.step)

    def without_gradients(self) -> list[Tensor]:
        """Returns the parameters that were expected to have a gradient, their first, and had none."""
        slots = [slot for bucket in self.plans.plans for slot in bucket.slots]
        return [slot.parameter for slot in slots if slot.index not in self._taken and slot.state["step"] == 0]
