"""The contract between the optimizer and a backend (DESIGN.md, "The backend contract").

A step has three phases. ``update`` takes m, v, s (and, if it can, x) through the step with the old d and gathers the
two sums; the optimizer adds up the sums of all plans, over the ranks too; ``finish`` derives d_new from them and
brings x to where the reference has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .hyper import Hyper, Shared
from .tensors import check_gradient


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a plan."""

    index: int  # among all parameters of the optimizer, for messages and random bits
    param: Tensor
    state: dict[str, Any]
    group: int
    slice_p: int
    low_precision: str | None = None  # how x is rounded (low_precision.py); None: it is float32 or float64


class ReadsSlots:
    """``unchanged`` and ``check`` for plans that read their tensors anew in every step."""

    reads_device = False

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.sums = torch.zeros(2, dtype=torch.float64, device=slots[0].param.device)
        self._layouts = [_layout(slot.param) for slot in slots]

    def unchanged(self) -> bool:
        return self._layouts == [_layout(slot.param) for slot in self.slots]

    def check(self, grads: list[Tensor | None]) -> None:
        for slot, grad in zip(self.slots, grads, strict=True):
            if grad is not None:
                check_gradient(slot.index, slot.param, grad)


def _layout(p: Tensor) -> tuple[Any, ...]:
    return p.shape, p.stride(), p.dtype, p.device, p.untyped_storage().nbytes() > 0


@dataclass
class Step:
    """What one step needs to know beside the tensors."""

    hypers: Sequence[Hyper]  # one per parameter group
    shared: Shared
    row: Tensor  # the estimate, float64[8]: read by both phases, written by the last plan's finish
    grad_scale: float = 1.0  # gradients are divided by it
    # What only the device knows, for plans with `reads_device`: each takes the place of the number, where it is there.
    lrs: Sequence[Tensor | None] = ()  # one per parameter group
    device_scale: Tensor | None = None
    found_inf: Tensor | None = None  # not zero: the step changes nothing, the estimate included
    sums: Tensor = field(init=False)  # float64[2], the total over all plans; set between the phases

    def to(self, device: torch.device) -> Step:
        """The step with its tensors on ``device``, as they are where they are there. Waits for copies to the CPU."""
        near = copy(self)
        for name, value in vars(self).items():
            setattr(near, name, [_near(v, device) for v in value] if name == "lrs" else _near(value, device))
        return near


def _near(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value


class Plan(Protocol):
    """The tensors of one bucket, on one device, made ready for one backend."""

    sums: Tensor
    """float64[2] on the plan's device: ``sum lr*bc*<g, x0 - x>`` and ``sum |s|``, after :meth:`update`."""

    reads_device: bool
    """Whether the plan takes scalars that are on the device, so that the host need not wait for them."""

    def unchanged(self) -> bool:
        """Whether the plan still fits its tensors: they may have been moved, cast or replaced since the last step."""

    def check(self, grads: list[Tensor | None]) -> None:
        """Checks the gradients, before anything is changed.

        A gradient laid out in another memory order may be replaced in ``grads`` by a copy.

        Raises:
            ValueError: a bad gradient (see :func:`prodigy_fused.tensors.check_gradient`).
        """

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        """Phase 1. A tensor whose gradient is None, or whose group has lr 0, is left alone and is in no sum."""

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        """Phases 2 and 3; the ``last`` plan of a step also writes the new estimate to ``step.row``."""
