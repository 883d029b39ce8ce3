"""The compiled CPU backend: one vectorised pass over all parameters, on all cores (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..state import state_dtype
from ..step import Slot, Step
from ..tensors import check_gradient, is_dense

try:
    from .. import _C

    assert len(FIELDS) == _C.ESTIMATE_FIELDS, "prodigy_fused._C was built from other sources: reinstall the package"
    MISSING = None
except ImportError as error:  # no C++ compiler when the package was installed
    MISSING = f"the compiled module is missing ({error}): reinstall prodigy-fused where there is a C++ compiler"


def unsupported(p: Tensor, group: dict[str, Any]) -> str | None:
    """Why this backend cannot take the parameter, and the remedy; None if it can."""
    if MISSING:
        return MISSING
    if p.device.type != "cpu":
        return f"the parameter is on {p.device}, not on the CPU"
    if p.dtype not in (torch.float32, torch.float64) or state_dtype(p, group) != p.dtype:
        return f"{p.dtype} parameters are not supported: use float32 parameters, with autocast, or fused=False"
    if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(p).__name__} is a tensor subclass without memory of its own: use fused=False"
    if not is_dense(p):
        return f"strides {p.stride()} leave gaps: make the parameter contiguous, or use fused=False"
    if p.dim() > _C.MAX_DIMS and not p.is_contiguous():
        return f"{p.dim()} dimensions in another order than row-major: make the parameter contiguous"
    return None


class CpuPlan:
    """The contract of :class:`prodigy_fused.step.Plan`."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        self._plan = _C.CpuPlan(list(slots), Tensor)

    def unchanged(self) -> bool:
        return self._plan.unchanged()

    def check(self, grads: list[Tensor | None]) -> None:
        while (i := self._plan.read_grads(grads)) >= 0:
            slot, grad = self.slots[i], grads[i]
            assert grad is not None
            check_gradient(slot.index, slot.param, grad)
            # Right, but in another memory order than its parameter.
            grads[i] = torch.empty_like(slot.param, memory_format=torch.preserve_format).copy_(grad)

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        self._plan.update(step, torch.get_num_threads(), step.row.data_ptr(), self.sums.data_ptr())

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        self._plan.finish(step, torch.get_num_threads(), step.row.data_ptr(), step.sums.data_ptr(), last)


make_plan = CpuPlan
