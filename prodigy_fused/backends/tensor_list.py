"""Pure-Python fallback of ``_C.TensorList``: the addresses of a plan's tensors and of their gradients."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..state import KEYS
from ..step import Slot
from ..tensors import fits_dtype, same_layout


def memory_order(t: Tensor) -> list[tuple[int, int]]:
    """Returns for each dimension, from the outermost in memory inwards, its stride and its row-major stride.

    Empty if ``t`` is row-major. ``t`` must be dense (:func:`prodigy_fused.tensors.is_dense`).
    """
    order, row_major = [], 1
    for stride, size in zip(reversed(t.stride()), reversed(t.shape), strict=True):
        if size > 1:
            order.append((stride, row_major))
        row_major *= size
    if all(stride == expected for stride, expected in order) or t.numel() == 0:
        return []
    return sorted(order, reverse=True)


class TensorList:
    """The tensors of a plan as they were when it was built, and the gradients of a step."""

    def __init__(self, slots: Sequence[Slot], tensor_class: type, state_format: str, estimates: int) -> None:
        self._known: list[list[Any]] = []
        self.extend(slots)

    def unchanged(self) -> bool:
        """Returns whether every parameter and state tensor is where it was."""
        return self._look() == self._known

    def unchanged_at(self, i: int) -> bool:
        """Returns whether those of slot i are."""
        return _look(self._slots[i]) == self._known[i]

    def mend(self) -> bool:
        """Takes note of the addresses that all tensors have now; returns whether nothing else has changed."""
        known, self._known = self._known, self._look()
        return all(map(_differ_in_address, chain(*known), chain(*self._known)))

    def extend(self, slots: Sequence[Slot]) -> None:
        """Takes up more tensors: ``slots`` are those that are there and new ones, in the order of all."""
        self._slots = slots
        self._known = self._look()
        self._words = array("Q")

    def load_gradients(self, grads: list[Tensor | None], first: int = 0) -> int:
        """Keeps the gradients' addresses, from the first on; returns the index of the first gradient that is laid out
        otherwise than its parameter, or -1."""
        if first == 0:
            self._words = array("Q", bytes(16 * len(grads)))  # unsigned: on Intel GPUs the highest bit is set
        for i, grad in enumerate(grads[first:], first):
            if grad is None:
                continue
            if not self.fits(i, grad):
                return i
            self._words[2 * i : 2 * i + 2] = array("Q", [grad.data_ptr(), 8 * grad.itemsize])
        return -1

    def fits(self, i: int, grad: Tensor) -> bool:
        """Returns whether a gradient is laid out as its parameter, so that its address is all that there is to know."""
        p = self._slots[i].param
        if type(grad).__torch_dispatch__ is not Tensor.__torch_dispatch__ or grad.layout != torch.strided:
            return False
        if not fits_dtype(grad, p) or grad.device != p.device or not same_layout(grad, p) or grad.is_neg():
            return False
        return grad.data_ptr() != 0 or grad.numel() == 0  # freed: 0 would pass for no gradient

    def release_gradients(self) -> None:
        """Forgets the gradients' addresses."""
        self._words = array("Q")

    def gradient_words(self, former: bytes = b"") -> bytes:
        """Returns each gradient's address and the bits of an element, 8 bytes each, 0 for None; ``former`` itself if
        that is the same."""
        words = self._words.tobytes()
        return former if former == words else words

    def _look(self) -> list[list[Any]]:
        return list(map(_look, self._slots))


def _look(slot: Slot) -> list[Any]:
    return [_where(slot.param), *(_where(slot.state.get(key)) for key in KEYS)]


def _differ_in_address(a: Any, b: Any) -> bool:
    """Returns whether two places differ in the address at most, and the second has memory."""
    if a is None or b is None:
        return a is b
    (_, *former), (address, *now) = a, b
    return bool(former == now and (address or 0 in b[1]))


def _where(t: Tensor | None) -> Any:
    return None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device)
