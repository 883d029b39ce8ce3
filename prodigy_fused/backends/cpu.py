"""The compiled CPU backend: one vectorised pass over all parameters, on all cores (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..step import Slot, Step
from .compiled import MISSING, CompiledPlan, unfit

if not MISSING:
    from .. import _C


def missing(device: torch.device) -> str | None:
    """Why this backend cannot be used on the CPU, and the remedy; None if it can."""
    return MISSING


def unsupported(p: Tensor, group: dict[str, Any]) -> str | None:
    """Why this backend cannot take the parameter, and the remedy; None if it can."""
    if MISSING:
        return MISSING
    if p.device.type != "cpu":
        return f"the parameter is on {p.device}, not on the CPU"
    return unfit(p, group)


class CpuPlan(CompiledPlan):
    """The contract of :class:`prodigy_fused.step.Plan`."""

    reads_device = False

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(slots, _C.CpuPlan)

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        self._plan.update(step, torch.get_num_threads(), step.row.data_ptr(), self.sums.data_ptr())

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        self._plan.finish(step, torch.get_num_threads(), step.row.data_ptr(), step.sums.data_ptr(), last)


make_plan = CpuPlan
