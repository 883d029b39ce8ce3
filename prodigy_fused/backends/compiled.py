"""What the backends in ``prodigy_fused._C`` have in common: what they can take, and the check of a step's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..step import Slot
from ..tensors import check_gradient, is_dense

MAX_DIMS = 8  # of a tensor in another memory order than row-major

try:
    from .. import _C

    assert len(FIELDS) == _C.ESTIMATE_FIELDS, "prodigy_fused._C was built from other sources: reinstall the package"
    assert MAX_DIMS == _C.MAX_DIMS, "prodigy_fused._C was built from other sources: reinstall the package"
    MISSING = None
except ImportError as error:  # no C++ compiler when the package was installed
    MISSING = f"the compiled module is missing ({error}): reinstall prodigy-fused where there is a C++ compiler"


def unfit(p: Tensor, group: dict[str, Any]) -> str | None:
    """Why no compiled backend can take the parameter, whatever its device; None if one can."""
    if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(p).__name__} is a tensor subclass without memory of its own: use fused=False"
    if not is_dense(p):
        return f"strides {p.stride()} leave gaps: make the parameter contiguous, or use fused=False"
    if p.dim() > MAX_DIMS and not p.is_contiguous():
        return f"{p.dim()} dimensions in another order than row-major: make the parameter contiguous"
    return None


class CompiledPlan:
    """``sums``, ``unchanged`` and ``check`` of :class:`prodigy_fused.step.Plan`, for a plan in C++."""

    def __init__(self, slots: Sequence[Slot], native: Any) -> None:
        self.slots = slots
        self.sums = torch.zeros(2, dtype=torch.float64, device=slots[0].param.device)
        self._plan = native(list(slots), Tensor)

    def unchanged(self) -> bool:
        return bool(self._plan.unchanged())

    def check(self, grads: list[Tensor | None]) -> None:
        while (i := self._plan.read_grads(grads)) >= 0:
            slot, grad = self.slots[i], grads[i]
            assert grad is not None
            check_gradient(slot.index, slot.param, grad)
            # Right, but in another memory order than its parameter, or minus what memory holds.
            grads[i] = torch.empty_like(slot.param, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(grad)
