"""Parameters in pieces: what the runs of foreach are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..eight_bits import blocks_of
from ..inference import writable
from ..rounding import EIGHTS
from ..state import KEYS
from ..step import Slot
from ..sums import ROW
from ..tensors import is_dense, same_layout, sampled

RowTable = tuple[Tensor, Tensor]
SAMPLED = ("s", "p0")


class Piece(NamedTuple):
    """A parameter, or a range of its elements in the order of memory."""

    slot: Slot
    x: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]
    begin: int = 0  # a multiple of ROW * slice_p
    loose: bool = False  # has gaps
    permuted: bool = False  # dense, with the dimensions in another order (channels_last)
    copied: bool = False  # the gradient is a copy, which is laid out as the parameter, or will be copied

    def sampled(self, elements: Tensor) -> Tensor:
        """Returns those that are sampled among elements in the order of ``x``."""
        if self.slot.slice_p > 1 and self.permuted:  # samples are counted in row-major order
            p = self.slot.param
            elements = elements.as_strided(p.shape, p.stride(), elements.storage_offset())
        return sampled(elements, self.slot.slice_p, self.slot.where)


def pieces_of(slot: Slot, grad: Tensor, most: int) -> Iterator[Piece]:
    """Yields a parameter in pieces of at most ``most`` elements, if it can be cut.

    They begin at multiples of whole rows of samples, so that the sums of rows do not depend on ``most``.
    """
    p = writable(slot.param)
    contiguous = p.is_contiguous()
    if contiguous and p.numel() <= most:
        yield Piece(slot, p, grad, slot.state, copied=not grad.is_contiguous())
        return
    permuted = not contiguous and is_dense(p)
    copied = not (grad.is_contiguous() if contiguous else same_layout(grad, p))
    if copied and permuted:
        grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
    tensors = {"x": p, "grad": grad} | {key: slot.state[key] for key in KEYS if key in slot.state}
    if permuted:
        for key, t in tensors.items():
            if t.shape == p.shape:
                tensors[key] = t.as_strided((t.numel(),), (1,))
    if p.numel() <= most or not (contiguous or (permuted and slot.slice_p == 1)):
        yield Piece(slot, tensors["x"], tensors["grad"], tensors, 0, not (contiguous or permuted), permuted, copied)
        return
    unit = ROW * slot.slice_p
    size = max(most // unit, 1) * unit
    pieces = range(-(-p.numel() // size))
    cut: dict[str, list[Tensor]] = {}
    for key, t in tensors.items():
        # The last piece of a shard may have no samples.
        own = size // slot.slice_p if key in SAMPLED else blocks_of(size) if key == "scale" else size
        t = t if key == "scale" or t.dim() == 0 else t.reshape(-1)
        cut[key] = [t[n * own : (n + 1) * own] if t.dim() > 0 else t for n in pieces]
    for i, (x, grad, *state) in enumerate(zip(*cut.values(), strict=True)):
        yield Piece(slot, x, grad, dict(zip(list(cut)[2:], state, strict=True)), i * size, False, permuted, copied)


def row_table(pieces: list[Piece], rows: list[int], device: torch.device) -> RowTable:
    """Returns, for each row of a grid, the parameter's index for random bits, and the row's position divided by 8,
    rounded down, both int64. Does not wait for the device."""
    counts = torch.tensor(rows)
    index, begin = torch.tensor(
        [(piece.slot.random_index, (piece.slot.random_base + piece.begin) // 8) for piece in pieces]
    ).T
    begin = begin - (counts.cumsum(0) - counts) * EIGHTS
    index, begin = (t.repeat_interleave(counts) for t in (index, begin))
    begin += torch.arange(len(begin)) * EIGHTS
    return index.to(device, non_blocking=True), begin.to(device, non_blocking=True)
