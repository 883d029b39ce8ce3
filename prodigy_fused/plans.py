"""From parameter groups to plans: which tensors a step processes together, and on which backend.

Plans are built once and looked at in every step, because between two steps anything may happen: a first gradient comes
late, FSDP or accelerate puts other objects into ``param_groups``, ``module.to()`` moves storages, a checkpoint is
loaded. New addresses are put into the plans that there are, and so are parameters with a first gradient; all else has
the plans built anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from . import backends, state
from .backends.gpu import GpuPlan, capturing
from .backends.native import same_entries, same_objects, with_gradients
from .buckets import Bucket, Gradients, key_of, mark, merged
from .dtensor import index_map, is_dtensor, local
from .eight_bits import is_coded, moves_in_codes
from .estimate import members
from .low_precision import mode_of
from .options import Group
from .redistribute import local_gradients
from .sampling import warn_of_columns
from .sharding import Span
from .step import BucketKey, Slot, Step
from .tensors import MemoryRuns, check_gradient, check_materialised, check_parameter


def parameters(groups: list[Group]) -> list[Tensor]:
    """Returns all parameters, in the order in which messages and checkpoints number them."""
    return list(chain.from_iterable(group["params"] for group in groups))


class PlanSet:
    """The plans of one optimizer, for the tensors it has now.

    The constructor and :meth:`keep_up` check every tensor that is new to them, and choose a backend for each parameter
    that has a gradient or a state; they change nothing. :meth:`build` creates what is missing.

    Args:
        gradients_to_come: where no parameter has a state, all that require a gradient take part.

    Raises:
        ValueError, TypeError, RuntimeError: a parameter or gradient that cannot be stepped.
    """

    def __init__(
        self, groups: list[Group], states: dict[Tensor, Any], span: Span, gradients_to_come: bool = False
    ) -> None:
        self.groups, self.states, self.span = groups, states, span
        self.members = [list(group["params"]) for group in groups]
        self.params = list(chain.from_iterable(self.members))
        self.owners = list(chain.from_iterable([i] * len(own) for i, own in enumerate(self.members)))
        self.firsts = list(accumulate(map(len, self.members), initial=0))
        self.estimates = len(members(groups))
        self.locals = list(map(local, self.params))
        self.maps = {i: index_map(p) for i, p in enumerate(self.params) if is_dtensor(p)}
        span.look(groups, self.params)
        self.waiting: list[int] = []  # no gradient seen yet: no state and no plan
        self.slots: list[Slot] = []
        self.plans: list[Bucket] = []
        self.keys: list[BucketKey] = []  # of the plans
        self.built = self.has_changed_states = False
        self.created: list[int] = []  # whose state is new in this step
        self._chosen: dict[int, str] = {}  # the backend of each parameter that takes part, by index
        self._memory = MemoryRuns()  # of those that are stepped in one pass
        self._new: list[int] = []  # take part, but have no plan yet
        self._gradients: list[Gradients] = []  # of each plan, and how many of them are None
        is_first = not any(state.is_there(states.get(p)) for p in self.params)
        self.take_up(self._participants(gradients_to_come and is_first))

    def _participants(self, all_of_them: bool) -> list[int]:
        """Returns the indices of the parameters that have a gradient or a state; the others are waiting."""
        found: list[int] = []
        seen: set[int] = set()
        for index, p in enumerate(self.params):
            if id(p) in seen:  # twice in one group, of which torch has warned: one step
                continue
            seen.add(id(p))
            check_materialised(index, p)
            has_part = p.grad is not None or state.is_there(self.states.get(p)) or (all_of_them and p.requires_grad)
            (found if has_part else self.waiting).append(index)
        return found

    def take_up(self, indices: Sequence[int]) -> None:
        """Chooses the backends of parameters that are to have a plan."""
        for index in indices:
            p = self.params[index]
            check_parameter(index, p)
            if p.grad is not None:
                check_gradient(index, p, p.grad)
            group = self.groups[self.owners[index]]
            self._chosen[index] = backends.choose(self.locals[index], group, self.maps.get(index))
        self._check_apart(indices)
        # Whether no plan needs scalars on the host.
        self.reads_device = bool(self._chosen) and all(backends.get(n).READS_DEVICE for n in set(self._chosen.values()))
        self._new += indices

    def _check_apart(self, indices: Iterable[int]) -> None:
        self._memory.add({i: self.locals[i] for i in indices if backends.get(self._chosen[i]).ONE_PASS})

    # -- building ------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Creates missing state, adapts the rest to its parameters, and builds plans, if there is anything new.

        Raises:
            ValueError: a state that does not fit its parameter; nothing has been changed then.
            RuntimeError: a CUDA graph is being captured.
        """
        if self.built:
            self.created = []
            return
        if any(capturing(self.locals[index].device) for index in self._new):
            raise RuntimeError("a step that has something to set up cannot be captured: take one before the capture")
        adapted = {
            index: self._adapted(index) for index in self._new if state.is_there(self.states.get(self.params[index]))
        }
        self.created = [index for index in self._new if index not in adapted]
        # All checks are done: from here on state is created, so nothing may raise because of a tensor.
        self.has_changed_states = True
        buckets: dict[BucketKey, list[Slot]] = {}
        for index in self._new:
            p, mine, group = self.params[index], self.locals[index], self.groups[self.owners[index]]
            own = self.states[p]
            if index in adapted:
                state.replace(own, adapted[index])
            else:
                own.update(state.create(mine, group, self.span.is_part(p, group), self.maps.get(index)))
            key = key_of(self._chosen[index], mine, group, self.span.counts(p, group))
            buckets.setdefault(key, []).append(self._slot(index))
        self.state_keys, self.state_values = list(self.states.keys()), list(self.states.values())
        for key, slots in buckets.items():
            self._add(key, slots)
        self.slots = merged(self.slots, list(chain.from_iterable(buckets.values())))
        self._new = []
        self.built = True
        if any(group["slice_p"] > 1 for group in self.groups):
            warn_of_columns(self.slots, self.created)

    def _slot(self, index: int) -> Slot:
        p, owner, where = self.params[index], self.owners[index], self.maps.get(index)
        group, split = self.groups[owner], self.estimates > 1
        estimate = owner if split else 0, group["frozen"], index - self.firsts[owner] if split else index
        mine = self.locals[index]
        own = self.states[p], owner, group["slice_p"], mode_of(mine, group)
        codes = is_coded(mine, group), moves_in_codes(mine, group)
        return Slot(index, mine, *own, *estimate, where, *codes, p if index in self.maps else None)

    def _add(self, key: BucketKey, slots: list[Slot]) -> None:
        """Gives new tensors to the plan of their bucket, or to a new one."""
        at = bisect_left(self.keys, key)
        if self.keys[at : at + 1] == [key]:
            self.plans[at].extend(slots)
        else:
            plan = backends.get(key.backend).make_plan(key, slots, self.estimates)
            self.keys.insert(at, key)
            self.plans.insert(at, Bucket.of(plan, slots))

    def _adapted(self, index: int) -> dict[str, Any]:  # others may have put back what a checkpoint has
        p, group, where = self.params[index], self.groups[self.owners[index]], self.maps.get(index)
        own = state.unwrapped(p, self.states[p], group, where) if index in self.maps else self.states[p]
        return state.adapted(index, self.locals[index], own, group, where)

    # -- keeping up ----------------------------------------------------------------------------------------------------

    def keep_up(self, groups: list[Group], states: dict[Tensor, Any], gradients_to_come: bool = False) -> bool:
        """Returns whether the plans are for these parameters and this state, as they are now.

        Takes note of new addresses, and of parameters with a first gradient, unless gradients are to come one by one.
        After False, or an exception, the plans are of no more use.

        Raises:
            ValueError, TypeError, RuntimeError: a parameter or gradient that cannot be stepped.
        """
        if not self.built or not self.has(groups, states) or not self.mend(self.moved()):
            return False
        arrived = [] if gradients_to_come else with_gradients(self.params, self.waiting)
        if arrived and self.maps:
            return False  # the gradients below would be redistributed, which all ranks have to do equally often
        if arrived:
            self.take_up(arrived)
            self.load_gradients()  # which checks those of the others, before state is created
            for index in arrived:
                del self.waiting[bisect_left(self.waiting, index)]
            self.built = False
        return True

    def moved(self) -> list[Bucket]:
        """Returns the plans whose tensors have changed."""
        return [bucket for bucket in self.plans if not bucket.plan.unchanged()]

    def has(self, groups: list[Group], states: dict[Tensor, Any]) -> bool:
        """Returns whether these are the very parameters and dictionaries. (Looking a tensor up in one is slow.)"""
        return (
            len(groups) == len(self.members)
            and all(same_objects(group["params"], own) for group, own in zip(groups, self.members, strict=True))
            and all(local(self.params[i]) is self.locals[i] for i in self.maps)
            and states is self.states
            and same_entries(states, self.state_keys, self.state_values)
        )

    def mend(self, buckets: list[Bucket]) -> bool:
        """Has plans, whose tensors have changed, take note of new addresses; returns whether that is all."""
        if not buckets:
            return True
        if self.capturing():
            return False  # there is something to set up
        for slot in chain.from_iterable(bucket.slots for bucket in buckets):
            check_parameter(slot.index, slot.param)
        self._memory = MemoryRuns()
        self._check_apart(self._chosen)
        return all(bucket.plan.mend() for bucket in buckets)

    # -- a step --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the estimate: that of the first plan."""
        if self.plans:
            return self.plans[0].plan.sums.device
        if self._chosen:
            return self.locals[next(iter(self._chosen))].device
        return self.locals[0].device if self.locals else torch.device("cpu")

    def capturing(self) -> bool:
        """Returns whether a step now becomes part of a CUDA graph."""
        return any(capturing(bucket.plan.sums.device) for bucket in self.plans)

    def load_gradients(self) -> None:
        """Gives every plan its gradients, checked.

        Raises:
            ValueError, RuntimeError: a bad gradient.
            RuntimeError: the step is captured in a CUDA graph, and a group is not ``capturable``.
        """
        if self.capturing() and not all(group["capturable"] for group in self.groups):
            raise RuntimeError("a step is captured in a CUDA graph: construct the optimizer with capturable=True")
        self.load(self._read_gradients())

    def load(self, gradients: list[Gradients]) -> None:
        """Gives every plan its gradients, with the number of those that are None."""
        self._gradients = gradients
        for bucket, (grads, _) in zip(self.plans, gradients, strict=True):
            bucket.plan.load_gradients(grads)

    def _read_gradients(self) -> list[Gradients]:
        if not self.maps:
            return [bucket.read_gradients() for bucket in self.plans]
        grads = local_gradients(self.params)  # in this order, since ranks may have other buckets
        own = [[grads[slot.index] for slot in bucket.slots] for bucket in self.plans]
        return [(some, sum(grad is None for grad in some)) for some in own]

    def update(self, step: Step) -> Tensor:
        """Runs phase 1 of all plans; returns the total of their sums, float64[E, 2] on the device of the estimates."""
        for bucket in self.plans:
            bucket.plan.update(step.to(bucket.plan.sums.device))
        return self.total(step)

    def total(self, step: Step) -> Tensor:
        """Returns the total of the plans' sums, float64[E, 2] on the device of the estimates."""
        counted = [
            bucket.plan.sums
            for key, bucket in zip(self.keys, self.plans, strict=True)
            if key.counted and not key.frozen
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
        for i, bucket in enumerate(self.plans):
            local = step.to(bucket.plan.sums.device)
            bucket.plan.finish(local, last=i == len(self.plans) - 1)
        if local is not step:  # the last plan is on another device than the first
            step.new_rows.copy_(local.new_rows)
        if not self.plans:  # a rank without gradients follows the others
            step.new_rows.copy_(step.advanced())
        mark(zip(self.plans, self._gradients, strict=True), step.hypers, bool(self.maps))

    def release_gradients(self) -> None:
        """Lets go of the gradients."""
        self._gradients = []
        for bucket in self.plans:
            bucket.release_gradients()

    def captured(self) -> list[Any]:
        """Returns what CUDA graphs, in which the plans take steps, read and write."""
        return [kept for bucket in self.plans if isinstance(bucket.plan, GpuPlan) for kept in bucket.plan.captured]
