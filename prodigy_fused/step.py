"""The contract between the optimizer and a backend (DESIGN.md, "The backend contract").

A step has three phases. ``update`` takes m, v, s (and, if it can, x) through the step with the old d and gathers the
two sums; the optimizer adds up the sums of all plans, over the ranks too; ``finish`` derives d_new from them and
brings x to where the reference has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from .estimate import Shared
from .hyper import Hyper


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a plan."""

    index: int  # among all parameters of the optimizer, for messages
    param: Tensor
    state: dict[str, Any]
    group: int
    slice_p: int


@dataclass
class Step:
    """What one step needs to know beside the tensors."""

    hypers: Sequence[Hyper]  # one per parameter group
    shared: Shared
    row: Tensor  # the estimate, float64[8]: read by both phases, written by the last plan's finish
    grad_scale: float = 1.0  # gradients are divided by it
    sums: Tensor = field(init=False)  # float64[2], the total over all plans; set between the phases


class Plan(Protocol):
    """The tensors of one bucket, on one device, made ready for one backend."""

    sums: Tensor
    """float64[2] on the plan's device: ``sum lr*bc*<g, x0 - x>`` and ``sum |s|``, after :meth:`update`."""

    def ready(self, grads: list[Tensor | None]) -> bool:
        """Checks the gradients, before anything is changed; False if the plan no longer fits its tensors.

        A gradient laid out in another memory order may be replaced in ``grads`` by a copy.

        Raises:
            ValueError: a bad gradient (see :func:`prodigy_fused.tensors.check_gradient`).
        """

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        """Phase 1. A tensor whose gradient is None, or whose group has lr 0, is left alone and is in no sum."""

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        """Phases 2 and 3; the ``last`` plan of a step also writes the new estimate to ``step.row``."""
