"""From parameter groups to plans: which tensors a step processes together, and on which backend.

Plans are built once and checked at every step, because between two steps anything may happen: a first gradient comes
late, FSDP or accelerate puts other objects into ``param_groups``, ``module.to()`` moves storages, a checkpoint is
loaded.
"""

from __future__ import annotations

from itertools import accumulate, chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import backends, state
from .backends.gpu import capturing
from .dtensor import index_map, is_dtensor, local
from .estimate import members
from .low_precision import mode_of
from .options import Group
from .redistribute import local_gradients
from .sharding import Span
from .step import BucketKey, Plan, Slot, Step
from .tensors import check_apart, check_gradient, check_parameter, describe


def parameters(groups: list[Group]) -> list[Tensor]:
    """Returns all parameters, in the order in which messages and checkpoints number them."""
    return list(chain.from_iterable(group["params"] for group in groups))


def check_all_are_stepped(before: list[Tensor], groups: list[Group], states: dict[Tensor, Any]) -> None:
    """Raises if the parameters of the last step are all gone, while their state is kept: DeepSpeed's ZeRO calls
    ``step()`` for a part of the parameters at a time, which is right for no optimizer with a number common to all.

    Raises:
        RuntimeError: names the remedy.
    """
    now = set(map(id, parameters(groups)))
    stepped = [p for p in before if state.is_there(states.get(p))]
    if now and stepped and not any(id(p) in now for p in stepped):
        raise RuntimeError(
            "this step is given other parameters than the last one, whose state is kept: Prodigy estimates d from all "
            "parameters, and cannot be stepped for a part of them at a time. With DeepSpeed's ZeRO, use one parameter "
            "group, and in stage 3 a sub_group_size that is at least the number of parameters; if the others were "
            "replaced for good, remove them from optimizer.state"
        )


class PlanSet:
    """The plans of one optimizer, for the tensors it has now.

    The constructor checks every tensor and chooses a backend for each parameter that has a gradient or a state; it
    changes nothing. :meth:`build` creates what is missing.

    Raises:
        ValueError, TypeError, RuntimeError: a parameter or gradient that cannot be stepped.
    """

    def __init__(self, groups: list[Group], states: dict[Tensor, Any], span: Span) -> None:
        self.groups, self.states, self.span = groups, states, span
        self.params = parameters(groups)
        self.sizes = [len(group["params"]) for group in groups]
        self.owners = list(chain.from_iterable([i] * size for i, size in enumerate(self.sizes)))
        self.firsts = list(accumulate(self.sizes, initial=0))
        self.estimates = len(members(groups))
        self.locals = list(map(local, self.params))
        self.maps = {i: index_map(p) for i, p in enumerate(self.params) if is_dtensor(p)}
        span.look(groups, self.params)
        self.waiting: list[int] = []  # no gradient seen yet: no state and no plan
        self.slots: list[Slot] = []
        self.plans: list[tuple[Plan, list[int]]] = []  # with the indices of its parameters
        self.keys: list[BucketKey] = []
        self.built = False

        self._chosen = self._choose()
        one_pass = {i: self.locals[i] for i, name in self._chosen.items() if backends.get(name).ONE_PASS}
        check_apart(one_pass)
        # Whether no plan needs scalars on the host.
        self.reads_device = bool(self._chosen) and all(backends.get(n).READS_DEVICE for n in self._chosen.values())

    def _choose(self) -> dict[int, str]:
        """Returns the backend of each parameter that takes part, by index."""
        chosen: dict[int, str] = {}
        seen: set[int] = set()
        for index, (p, owner) in enumerate(zip(self.params, self.owners, strict=True)):
            if id(p) in seen:  # twice in one group, of which torch has warned: one step
                continue
            seen.add(id(p))
            if p.is_meta and not is_lazy(p):
                raise ValueError(
                    f"{describe(index, p)} is still on the meta device: the model was materialised into other tensors; "
                    "construct the optimizer afterwards, or call torch.__future__."
                    "set_swap_module_params_on_conversion(True) before the model is"
                )
            if p.grad is None and not state.is_there(self.states.get(p)):
                self.waiting.append(index)
                continue
            check_parameter(index, p)
            if p.grad is not None:
                check_gradient(index, p, p.grad)
            chosen[index] = backends.choose(self.locals[index], self.groups[owner], self.maps.get(index))
        return chosen

    # -- building ------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Creates missing state, adapts the rest to its parameters, and builds the plans. Once; later calls do nothing.

        Raises:
            ValueError: a state that does not fit its parameter; nothing has been changed then.
            RuntimeError: a CUDA graph is being captured.
        """
        if self.built:
            return
        if any(capturing(self.locals[index].device) for index in self._chosen):
            raise RuntimeError("a step that has something to set up cannot be captured: take one before the capture")
        adapted = {
            index: self._adapted(index) for index in self._chosen if state.is_there(self.states.get(self.params[index]))
        }
        # All checks are done: from here on state is created, so nothing may raise because of a tensor.
        buckets: dict[BucketKey, list[Slot]] = {}
        for index, name in self._chosen.items():
            p, group = self.locals[index], self.groups[self.owners[index]]
            self._give_state(index, adapted.get(index))
            slot = Slot(
                index,
                p,
                self.states[self.params[index]],
                self.owners[index],
                group["slice_p"],
                mode_of(p, group),
                self.owners[index] if self.estimates > 1 else 0,
                group["frozen"],
                index - self.firsts[self.owners[index]] if self.estimates > 1 else index,
                self.maps.get(index),
                self.params[index] if index in self.maps else None,
            )
            self.slots.append(slot)
            counted = self.span.counts(self.params[index], group)
            buckets.setdefault(_key(name, p, group, counted), []).append(slot)
        self.state_keys, self.state_values = list(self.states.keys()), list(self.states.values())
        self.keys = sorted(buckets)
        for key in self.keys:
            plan = backends.get(key.backend).make_plan(key, buckets[key], self.estimates)
            self.plans.append((plan, [slot.index for slot in buckets[key]]))
        self.built = True

    def _adapted(self, index: int) -> dict[str, Any]:
        p, group, where = self.params[index], self.groups[self.owners[index]], self.maps.get(index)
        # Others may have put back what a checkpoint has.
        own = state.unwrapped(p, self.states[p], group, where) if is_dtensor(p) else self.states[p]
        return state.adapted(index, self.locals[index], own, group, where)

    def _give_state(self, index: int, adapted: dict[str, Any] | None) -> None:
        """Creates the state of a parameter, or replaces what had to be adapted."""
        p, group = self.params[index], self.groups[self.owners[index]]
        own = self.states[p]  # a dictionary in which others may keep something, too
        if adapted is None:
            is_part = self.span.is_part(p, group)
            own.update(state.create(self.locals[index], group, is_part, self.maps.get(index)))
            return
        for field in state.FIELDS:
            if field.key not in adapted and (group["frozen"] or not field.in_reference):
                own.pop(field.key, None)  # an option has changed, or the samples are given back
        own.setdefault("step", 0)
        own.update(adapted)

    def still_valid(self, groups: list[Group], states: dict[Tensor, Any]) -> bool:
        """Returns whether the plans were built for these parameters and this state, as they are now."""
        params = parameters(groups)
        return (
            self.built
            and self.sizes == [len(group["params"]) for group in groups]
            and all(map(is_, params, self.params))
            and all(local(self.params[i]) is self.locals[i] for i in self.maps)
            and states is self.states
            # By identity: looking a tensor up in a dictionary is slow.
            and len(states) == len(self.state_values)
            and all(map(is_, states.keys(), self.state_keys))
            and all(map(is_, states.values(), self.state_values))
            and all(self.params[i].grad is None for i in self.waiting)
            and all(plan.unchanged() for plan, _ in self.plans)
        )

    # -- a step --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the estimate: that of the first plan."""
        if self.plans:
            return self.plans[0][0].sums.device
        if self._chosen:
            return self.locals[next(iter(self._chosen))].device
        return self.locals[0].device if self.locals else torch.device("cpu")

    def capturing(self) -> bool:
        """Returns whether a step now becomes part of a CUDA graph."""
        return any(capturing(plan.sums.device) for plan, _ in self.plans)

    def load_gradients(self) -> None:
        """Gives every plan its gradients, checked.

        Raises:
            ValueError, RuntimeError: a bad gradient.
            RuntimeError: the step is captured in a CUDA graph, and a group is not ``capturable``.
        """
        if self.capturing() and not all(group["capturable"] for group in self.groups):
            raise RuntimeError("a step is captured in a CUDA graph: construct the optimizer with capturable=True")
        grads = local_gradients(self.params) if self.maps else [p.grad for p in self.params]
        for plan, indices in self.plans:
            plan.load_gradients([grads[i] for i in indices])

    def update(self, step: Step) -> Tensor:
        """Runs phase 1 of all plans; returns the total of their sums, float64[E, 2] on the device of the estimates."""
        for plan, _ in self.plans:
            plan.update(step.to(plan.sums.device))
        counted = [
            plan.sums for key, (plan, _) in zip(self.keys, self.plans, strict=True) if key.counted and not key.frozen
        ]
        if len(counted) == 1:
            return counted[0]
        total = step.rows.new_zeros(len(step.rows), 2)
        for sums in counted:
            total += sums.to(total.device, non_blocking=not total.is_cpu)
        return total

    def finish(self, step: Step) -> None:
        """Runs phase 2 of all plans with ``step.sums``, and writes the new estimates to ``step.new_rows``."""
        local = step
        for i, (plan, _) in enumerate(self.plans):
            local = step.to(plan.sums.device)
            plan.finish(local, last=i == len(self.plans) - 1)
        if local is not step:  # the last plan is on another device than the first
            step.new_rows.copy_(local.new_rows)
        if not self.plans:  # a rank without gradients follows the others
            step.new_rows.copy_(step.advanced())
        self._mark(step)

    def _mark(self, step: Step) -> None:
        """Counts the step in the state of each parameter that took it, and tells autograd what was written."""
        active = [isinstance(h.lr, Tensor) or h.lr > 0 for h in step.hypers]
        taking = [slot for slot in self.slots if active[slot.group] and self.params[slot.index].grad is not None]
        for slot in taking:
            slot.state["step"] += 1
        torch.autograd.graph.increment_version([slot.param for slot in taking])
        torch.autograd.graph.increment_version([slot.whole for slot in taking if slot.whole is not None])

    def release_gradients(self) -> None:
        """Lets go of the gradients."""
        for plan, _ in self.plans:
            plan.release_gradients()


def _key(backend: str, p: Tensor, group: Group, counted: bool) -> BucketKey:
    dtype, state_format = (str(t).removeprefix("torch.") for t in (p.dtype, state.state_dtype(p, group)))
    sampled = group["slice_p"] > 1 and not group["frozen"]
    displaced = mode_of(p, group) == "displacement"
    return BucketKey(backend, str(p.device), dtype, state_format, sampled, displaced, group["frozen"], counted)
