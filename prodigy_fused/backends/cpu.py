"""The compiled CPU backend: one vectorised pass over all parameters, on all cores (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..options import Group
from ..step import BucketKey, Slot, Step
from .native import MISSING, NativePlan, unfit

if not MISSING:
    from .. import _C

COMPILED = ONE_PASS = True
READS_DEVICE = False


def missing(device: torch.device) -> str | None:
    """Returns what would have to be installed to step tensors on ``device``; None if nothing."""
    return MISSING if device.type == "cpu" else None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns why this backend cannot take the parameter, and the remedy; None if it can."""
    if MISSING:
        return MISSING
    if p.device.type != "cpu":
        return f"the parameter is on {p.device}, not on the CPU"
    return unfit(p, group)


class CpuPlan(NativePlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int) -> None:
        super().__init__(key, slots, estimates, _C.CpuPlan)
        self._make_partials()

    def extend(self, slots: Sequence[Slot]) -> None:
        super().extend(slots)
        self._make_partials()

    def _make_partials(self) -> None:
        self._partials = self.sums.new_zeros(self._native.chunk_count, 2)

    def update(self, step: Step) -> None:
        self._native.update(step.record, torch.get_num_threads(), step.rows.data_ptr(), self._partials.data_ptr())
        self.add_up(step)

    def update_one(self, step: Step, at: int, grad: Tensor) -> None:
        numbers = step.record, torch.get_num_threads(), step.rows.data_ptr(), self._partials.data_ptr()
        self._update_laid_out(at, grad, lambda laid_out: self._native.update_one(at, laid_out, *numbers))

    def add_up(self, step: Step) -> None:
        self._native.add_up(self._partials.data_ptr(), self.sums.data_ptr())

    def finish(self, step: Step, last: bool) -> None:
        rows, new_rows = step.rows.data_ptr(), step.new_rows.data_ptr()
        self._native.finish(step.record, torch.get_num_threads(), rows, new_rows, step.sums.data_ptr(), last)


make_plan = CpuPlan
