"""What the plans share whose tensors are found by address: in ``prodigy_fused._C``, or in Python for Triton without it.

Note [Who keeps gradients alive]
The kernels know addresses only. A plan keeps the gradients themselves from ``load_gradients`` to ``release_gradients``,
and with them the copies it had to make; torch's allocators reuse freed memory in stream order, so kernels that are
still running at the release have finished before anything else is written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..options import Group
from ..record import GROUP_FIELDS, STEP_FIELDS
from ..state import KEYS
from ..step import BucketKey, Slot
from ..tensors import check_gradient, is_dense

MAX_DIMS = 8  # of a tensor in another memory order than row-major
# What kernels must know as this Python does; Triton's have no state keys, since their table of addresses has names.
RECORD = {"ESTIMATE_FIELDS": FIELDS, "STEP_FIELDS": STEP_FIELDS, "GROUP_FIELDS": GROUP_FIELDS, "MAX_DIMS": MAX_DIMS}
LAYOUT = {**RECORD, "STATE_KEYS": KEYS}


class LayoutError(ImportError):
    """Kernels were built for other words than this Python writes."""


def check_layout(module: Any, wanted: dict[str, Any]) -> None:
    """Checks that kernels were built for the very words that this Python writes.

    Raises:
        LayoutError: a list of names, or a number, of ``module`` is not the wanted one; names it, and what differs.
    """
    for name, value in wanted.items():
        found = getattr(module, name, None)
        if found == value:
            continue
        problem = "another layout"
        if isinstance(found, tuple) and isinstance(value, tuple):
            lacking, extra = sorted({*value} - {*found}), sorted({*found} - {*value})
            parts = [f"lacks {lacking}"] * bool(lacking) + [f"has {extra}, which Python lacks"] * bool(extra)
            problem = " and ".join(parts) or "has another order"
        raise LayoutError(f"{name}: {problem}")


try:
    from .. import _C

    check_layout(_C, LAYOUT)
    MISSING = None
except LayoutError as error:
    MISSING = (
        f"the compiled module was built from other sources ({error}): reinstall prodigy-fused (in a checkout: make "
        "build)"
    )
except ImportError as error:  # there was no C++ compiler when the package was installed
    MISSING = f"the compiled module is missing ({error}): reinstall prodigy-fused where there is a C++ compiler"


def unfit(p: Tensor, group: Group) -> str | None:
    """Returns why no compiled backend can take the parameter, whatever its device; None if one can.

    Here belongs also the refusal of an option that only the backends in Python have.
    """
    if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(p).__name__} is a tensor subclass without memory of its own: use fused=False"
    if not is_dense(p):
        return f"strides {p.stride()} leave gaps: make the parameter contiguous, or use fused=False"
    if p.dim() > MAX_DIMS and not p.is_contiguous():
        return f"{p.dim()} dimensions in another order than row-major: make the parameter contiguous"
    return None


class NativePlan:
    """The part of :class:`prodigy_fused.step.Plan` that is common to plans which find tensors by address.

    Args:
        native: class of the object that knows the addresses of ``slots``: ``_C.CpuPlan``, ``_C.CudaPlan``,
            ``_C.TensorList``, or :class:`prodigy_fused.backends.tensor_list.TensorList`.
    """

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int, native: Any) -> None:
        self.slots = slots
        self.sums = torch.zeros(estimates, 2, dtype=torch.float64, device=slots[0].param.device)
        self._native = native(list(slots), Tensor, key.state_format, estimates)
        self._grads: list[Tensor | None] = []

    def unchanged(self) -> bool:
        return bool(self._native.unchanged())

    def load_gradients(self, grads: Sequence[Tensor | None]) -> None:
        loaded = list(grads)
        while (i := self._native.load_gradients(loaded)) >= 0:
            slot, grad = self.slots[i], loaded[i]
            assert grad is not None
            check_gradient(slot.index, slot.param, grad)
            # Right, but in another memory order than its parameter, or minus the values in memory.
            loaded[i] = torch.empty_like(slot.param, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(grad)
        self._grads = loaded  # see Note [Who keeps gradients alive]

    def release_gradients(self) -> None:
        self._native.release_gradients()
        self._grads = []
