"""From parameter groups to plans: which tensors a step takes together, and on which backend.

Plans are built once and checked at every step, because between two steps anything may happen: a first gradient comes
late, FSDP or accelerate puts other objects into ``param_groups``, ``module.to()`` moves storages, a checkpoint is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import backends, state
from .low_precision import mode_of
from .step import Plan, Slot
from .tensors import check_apart, check_gradient, check_parameter

Groups = list[dict[str, Any]]


def parameters(groups: Groups) -> list[Tensor]:
    """All parameters, in the order in which messages and checkpoints number them."""
    return list(chain.from_iterable(group["params"] for group in groups))


def capturing(tensors: Iterable[Tensor]) -> bool:
    """Whether what is done with these tensors becomes part of a CUDA graph."""
    return any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()


class Plans:
    """The plans of one optimizer, for the tensors it has now.

    Raises:
        ValueError, TypeError, RuntimeError: a parameter or gradient that cannot be stepped. Checked for all of them
            before the first state is created.
    """

    def __init__(self, groups: Groups, states: dict[Tensor, Any]) -> None:
        self.params = parameters(groups)
        self.sizes = [len(group["params"]) for group in groups]
        self.states = states
        self.waiting: list[int] = []  # no gradient seen yet: no state and no plan
        owner = list(chain.from_iterable([i] * len(group["params"]) for i, group in enumerate(groups)))
        self.sharded = any(group["fsdp_in_use"] for group in groups)
        self.sharded |= any(hasattr(p, "_fsdp_flattened") for p in self.params)

        chosen: dict[int, str] = {}
        for index, (p, g) in enumerate(zip(self.params, owner, strict=True)):
            if p.grad is None and not states.get(p):
                self.waiting.append(index)
                continue
            check_parameter(index, p)
            if p.grad is not None:
                check_gradient(index, p, p.grad)
            chosen[index] = backends.choose(p, groups[g])

        check_apart({index: self.params[index] for index, name in chosen.items() if backends.in_one_pass(name)})
        if capturing(self.params[index] for index in chosen):
            raise RuntimeError("a step that has something to set up cannot be captured: take one before the capture")
        followed = {
            index: state.follow(index, p, states[p], groups[owner[index]])
            for index, p in ((index, self.params[index]) for index in chosen)
            if states.get(p)
        }
        # Nothing below can fail for a reason that lies in a tensor.
        self.slots: list[Slot] = []
        buckets: dict[Any, list[Slot]] = {}
        for index, name in chosen.items():
            p, group = self.params[index], groups[owner[index]]
            if index in followed:
                states[p].pop("delta", None)  # the option may have changed
                states[p].update(followed[index])
            else:
                states[p] = state.create(p, group, self.sharded)
            key = (name, str(p.device), str(p.dtype), str(state.state_dtype(p, group)))
            slot = Slot(index, p, states[p], owner[index], group["slice_p"], mode_of(p, group))
            self.slots.append(slot)
            buckets.setdefault(key, []).append(slot)
        self.with_state, self.state = list(states.keys()), list(states.values())
        # In the order of their keys, so that regrouping the same parameters does not reorder the sums.
        self.plans = [
            (backends.make_plan(key[0], slots), [s.index for s in slots]) for key, slots in sorted(buckets.items())
        ]

    @property
    def device(self) -> torch.device:
        """Where the estimate lives: with the first plan."""
        if self.plans:
            return self.plans[0][0].sums.device
        return self.params[0].device if self.params else torch.device("cpu")

    def capturing(self) -> bool:
        """Whether a step now becomes part of a CUDA graph."""
        return capturing(plan.sums for plan, _ in self.plans)

    def fit(self, groups: Groups, states: dict[Tensor, Any]) -> bool:
        """Whether these are still the parameters and the state the plans were built for."""
        params = parameters(groups)
        return (
            self.sizes == [len(group["params"]) for group in groups]
            and all(map(is_, params, self.params))
            and states is self.states
            # By identity: to look a tensor up in a dictionary is slow.
            and len(states) == len(self.state)
            and all(map(is_, states.keys(), self.with_state))
            and all(map(is_, states.values(), self.state))
            and all(self.params[i].grad is None for i in self.waiting)
            and all(plan.unchanged() for plan, _ in self.plans)
        )

    def work(self, groups: Groups) -> list[tuple[Plan, list[Tensor | None]]]:
        """Every plan with its gradients, all checked.

        Raises:
            ValueError: a bad gradient.
            RuntimeError: the step is captured in a CUDA graph, and a group is not ``capturable``.
        """
        if self.capturing() and not all(group["capturable"] for group in groups):
            raise RuntimeError("a step is captured in a CUDA graph: construct the optimizer with capturable=True")
        work = [(plan, [self.params[i].grad for i in indices]) for plan, indices in self.plans]
        for plan, grads in work:
            plan.check(grads)
        return work
