"""What the plans share whose tensors are found by address: in ``prodigy_fused._C``, or in Python for Triton without it.

Note [Who keeps gradients alive]
The kernels know addresses only. A plan keeps the gradients themselves from ``load_gradients`` to ``release_gradients``,
and with them the copies it had to make; torch's allocators reuse freed memory in stream order, so kernels that are
still running at the release have finished before anything else is written there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..options import Group
from ..record import GROUP_FIELDS, STEP_FIELDS
from ..state import KEYS
from ..step import BucketKey, Slot, Step
from ..tensors import check_gradient, describe, is_dense

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


def images_are_right(shows: Callable[[Tensor, type, Callable[[Tensor], Any]], bool]) -> bool:
    """Returns whether the image of a tensor shows whatever is done to it, and nothing else: see Note [Images] in
    csrc/python/tensor_image.h.

    Args:
        shows: ``_C.image_shows``.
    """

    def as_before(change: Callable[[Tensor], Any]) -> bool:
        return shows(torch.ones(3, 3, dtype=torch.float32, device="cpu"), Tensor, change)

    changes: list[Callable[[Tensor], Any]] = [
        lambda t: setattr(t, "data", t.clone()),
        lambda t: setattr(t, "data", t.view(torch.int32)),
        lambda t: t.untyped_storage().resize_(0),
        lambda t: t.untyped_storage().resize_(1 << 16),
        lambda t: t.set_(t.untyped_storage(), 1, (2, 2), (3, 1)),
        lambda t: t.set_(t.untyped_storage(), 0, (3, 3), (1, 3)),
        lambda t: t.set_(t.untyped_storage(), 0, (3, 2), (3, 1)),
        lambda t: t.resize_(9),
        lambda t: torch.utils.swap_tensors(t, t.clone()),  # type: ignore[no-untyped-call]
    ]
    if hasattr(torch, "_lazy_clone"):  # what shares memory until one is changed
        changes.append(torch._lazy_clone)
    harmless: list[Callable[[Tensor], Any]] = [lambda t: None, lambda t: t.mul_(2)]
    try:
        return all(map(as_before, harmless)) and not any(map(as_before, changes))
    except Exception:  # a change that this torch does not allow, or not here, as under FakeTensorMode
        return False


try:
    import prodigy_fused._C as _C  # "from .. import _C" would blame a circular import where it is missing

    check_layout(_C, LAYOUT)
    _C.trust_images(images_are_right(_C.image_shows))
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


def same_objects(a: Sequence[Any], b: list[Any]) -> bool:
    """Returns whether two sequences hold the very same objects."""
    return len(a) == len(b) and all(map(is_, a, b)) if MISSING else _C.same_objects(a, b)


def same_entries(entries: dict[Any, Any], keys: list[Any], values: list[Any]) -> bool:
    """Returns whether the keys and values of a dictionary are, in its order, the very objects of two lists."""
    if not MISSING and isinstance(entries, dict):  # a caller may have put what he likes in its place
        return _C.same_entries(entries, keys, values)
    return same_objects(list(entries.keys()), keys) and same_objects(list(entries.values()), values)


def read_gradients(params: list[Tensor], grads: list[Tensor | None]) -> int:
    """Puts the gradients of parameters into a list of the same length; returns how many of them are None."""
    if not MISSING:
        return _C.read_gradients(params, grads)
    grads[:] = [p.grad for p in params]
    return sum(grad is None for grad in grads)


def with_gradients(params: list[Tensor], indices: list[int]) -> list[int]:
    """Returns those of some parameters, given by their indices, that have a gradient."""
    return [i for i in indices if params[i].grad is not None] if MISSING else _C.with_gradients(params, indices)


def clear(objects: list[Any]) -> None:
    """Replaces all objects of a list by None."""
    if not MISSING:
        _C.clear(objects)
    else:
        objects[:] = [None] * len(objects)


def count_steps(states: list[dict[str, Any]]) -> None:
    """Adds 1 to the entry ``step`` of each state."""
    if not MISSING:
        _C.count_steps(states)
        return
    for state in states:
        state["step"] = state.get("step", 0) + 1


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
        self._partials: Tensor  # float64[chunks, 2]: what each chunk adds to the sums

    def unchanged(self) -> bool:
        return bool(self._native.unchanged())

    def unchanged_at(self, at: int) -> bool:
        return bool(self._native.unchanged_at(at))

    def mend(self) -> bool:
        return bool(self._native.mend())

    def extend(self, slots: Sequence[Slot]) -> None:
        self._native.extend(list(slots))
        self.slots = slots

    def load_gradients(self, grads: list[Tensor | None]) -> None:
        copied = -1
        while (i := self._native.load_gradients(grads, max(copied, 0))) >= 0:
            if i == copied:
                what = describe(self.slots[i].index, self.slots[i].param)
                raise RuntimeError(f"a copy of the gradient of {what} cannot be read either")
            grads[i] = self._laid_out(i, grads[i])
            copied = i
        self._grads = grads  # see Note [Who keeps gradients alive]

    def _laid_out(self, at: int, grad: Any) -> Tensor:
        """Returns a gradient that the kernels cannot read as one that they can."""
        slot = self.slots[at]
        check_gradient(slot.index, slot.param, grad)
        # Right, but in another memory order than its parameter, or minus the values in memory.
        return torch.empty_like(slot.param, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(grad)

    def release_gradients(self) -> None:
        self._native.release_gradients()
        self._grads = []

    # -- gradients one by one ------------------------------------------------------------------------------------------

    def _first_chunks(self) -> Sequence[int]:
        """Returns for each tensor the number of its first chunk, and the number of all."""
        first_chunks: Sequence[int] = self._native.first_chunks
        return first_chunks

    def begin(self, step: Step) -> None:
        self._partials.zero_()

    def _update_laid_out(self, at: int, grad: Tensor, update: Callable[[Tensor], bool]) -> None:
        """Calls ``update`` with a gradient, or a copy in the layout that it wants; it returns whether it took it."""
        if not update(grad) and not update(self._laid_out(at, grad)):
            slot = self.slots[at]
            raise RuntimeError(f"{describe(slot.index, slot.param)} was changed in the middle of a step")

    def partials(self) -> Any:
        ranges, partials = pairwise(self._first_chunks()), self._partials.clone()
        return {slot.index: partials[slice(*own)] for slot, own in zip(self.slots, ranges, strict=True)}

    def put_partials(self, partials: Any) -> None:
        for slot, (begin, end) in zip(self.slots, pairwise(self._first_chunks()), strict=True):
            own = partials.get(slot.index)
            if own is not None:
                self._partials[begin:end] = own
