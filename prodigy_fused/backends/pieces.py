"""Parameters in pieces, and runs of pieces: what the operations of foreach work on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import eight_bits
from ..eight_bits import CODES, Code, blocks_of
from ..hyper import Hyper
from ..options import SIXTEEN_BIT
from ..rounding import EIGHTS, fourth, kept_value, row_bits, second, stochastic, stochastic_24, third
from ..state import KEYS
from ..step import Slot
from ..sums import ROW
from ..tensors import is_dense, same_layout, sampled
from .elementwise import arithmetic
from .flat import Grid, Values

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
    p = slot.param
    contiguous = p.is_contiguous()
    if contiguous and p.numel() <= most:
        yield Piece(slot, p, grad, slot.state)
        return
    permuted = not contiguous and is_dense(p)
    if permuted and not same_layout(grad, p):
        grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
    tensors = {"x": p, "grad": grad} | {key: slot.state[key] for key in KEYS if key in slot.state}
    if permuted:
        for key, t in tensors.items():
            if t.shape == p.shape:
                tensors[key] = t.as_strided((t.numel(),), (1,))
    if p.numel() <= most or not (contiguous or (permuted and slot.slice_p == 1)):
        yield Piece(slot, tensors["x"], tensors["grad"], tensors, 0, not (contiguous or permuted), permuted)
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
        yield Piece(slot, x, grad, dict(zip(list(cut)[2:], state, strict=True)), i * size, False, permuted)


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


class Run:
    """Pieces of tensors with the same options, which are stepped together.

    The state is changed where it is, if it has the precision for it; what is made for the step is flat where operations
    need it.
    """

    def __init__(self, pieces: list[Piece], h: Hyper, on_host: bool, copies: bool, tables: dict[Any, RowTable]) -> None:
        """Takes the pieces.

        Args:
            on_host: whether numbers can be read without waiting.
            copies: whether the state is copied to flat tensors, too, and back.
            tables: what is kept from step to step for random bits.
        """
        self.pieces, self.h, self.slot = pieces, h, pieces[0].slot
        self.dtype = arithmetic(self.slot.param)
        self.displaced = self.slot.low_precision == "displacement"
        self.extended = self.slot.low_precision == "24bit"
        self.on_host, self._tables = on_host, tables
        self._copies = (copies and len(pieces) > 1) or any(piece.loose for piece in pieces)
        self.xs = [piece.x for piece in pieces]
        self.grid = Grid(self.xs, not on_host)
        self._bits: Tensor | None = None
        if not self.slot.frozen:
            self._samples = self._sampled(self.xs)
            self.sample_grid = self.grid if self.slot.slice_p == 1 else Grid(self._samples, not on_host)

    def _sampled(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.slot.slice_p == 1:
            return tensors
        return [piece.sampled(t) for piece, t in zip(self.pieces, tensors, strict=True)]

    # -- values ------------------------------------------------------------------------------------------------------

    def stored(self, key: str) -> list[Tensor]:
        """Returns tensors themselves: "x", "grad", or the state's."""
        if key == "x":
            return self.xs
        if key == "grad":
            return [piece.grad for piece in self.pieces]
        found = [piece.state[key] for piece in self.pieces]
        if key == "p0":  # a number if x0 is zero everywhere
            likes = self.xs if self.displaced else self._samples
            found = [t if t.dim() else t.expand(like.shape) for t, like in zip(found, likes, strict=True)]
        return found

    def values(self, key: str) -> Values:
        """Returns values that may be changed, and then are to be stored: where possible the tensors themselves."""
        grid = self.sample_grid if key in SAMPLED and not self.displaced else self.grid
        tensors = self.stored(key)
        if self.slot.has_codes_of(key):
            root = eight_bits.decode(*self._codes(key))
            return Values(grid, root.mul_(root) if key == "exp_avg_sq" else root)
        if key == "x" and self.extended:
            return Values(grid, self.flat("x"))
        first = tensors[0]
        if first.dtype != self.dtype or self._copies:
            return Values(grid, grid.flat(tensors, self.dtype))
        if len(tensors) == 1:
            # Of these only a gradient, which is not written to, may be laid out otherwise.
            return Values(grid, first.reshape(-1) if key == "grad" else first.view(-1))
        return Values(grid, parts=tensors)

    def flat(self, key: str) -> Tensor:
        """Returns a copy; of 24 bits, the kept value."""
        if key == "x" and self.extended:
            x, low = self.stored("x"), self.stored("low")
            return kept_value(self.grid.flat(x, x[0].dtype), self.grid.flat(low, torch.int8))
        return self.grid.flat(self.stored(key), self.dtype)

    def store(self, key: str, values: Values, k: Any) -> None:
        """Stores what :meth:`values` returned and was changed since."""
        if self.slot.has_codes_of(key):
            self._store_codes(key, values.joined(), k)
            return
        tensors = self.stored(key)
        dtype = tensors[0].dtype
        if dtype == self.dtype and not self._copies:
            return
        flat = values.joined()
        if key == "x" and self.extended:
            flat, low = stochastic_24(flat, self._bits_for(key, k))
            torch._foreach_copy_(self.stored("low"), values.grid.parts(low))
        if dtype in SIXTEEN_BIT and (
            key in ("exp_avg_sq", "s") or (key, self.slot.low_precision) == ("x", "stochastic")
        ):
            flat = stochastic(flat, dtype, self._bits_for(key, k))
        flat = flat.to(dtype)
        torch._foreach_copy_(tensors, values.parts if flat is values.flat else values.grid.parts(flat))

    def _codes(self, key: str) -> tuple[Code, Tensor, Tensor]:
        """Returns what the codes of the run's only piece are, the codes, flat, and their column of scale."""
        code, (piece,) = CODES[key], self.pieces
        return code, piece.state[key].view(-1), piece.state["scale"][:, code.column]

    def _store_codes(self, key: str, flat: Tensor, k: Any) -> None:
        code, codes, scale = self._codes(key)
        flat = flat.sqrt() if key == "exp_avg_sq" else flat
        bits = None if key == "exp_avg" else self._bits_for(key, k)
        for to, value in zip((codes, scale), eight_bits.encode(code, flat, bits), strict=True):
            to.copy_(value)

    def _bits_for(self, key: str, k: Any) -> Tensor:
        """Returns random bits for what is stored under a key."""
        if self._bits is None:
            device = self.slot.param.device
            pieces = tuple((piece.slot.index, piece.begin) for piece in self.pieces)
            table = self._tables.get(pieces) or row_table(self.pieces, self.grid.rows, device)
            if device.type != "cpu":
                self._tables[pieces] = table
            self._bits = self.grid.of_rows(row_bits(k, *table, lead=self.slot.random_base % 8))
        if key == "s":
            return third(self.sampled(Values(self.grid, self._bits)).joined())
        return self._bits if key == "x" else fourth(self._bits) if key == "delta" else second(self._bits)

    def sampled(self, values: Values) -> Values:
        """Returns the samples among the elements of the parameters: the same values if that is all of them."""
        if self.sample_grid is self.grid:
            return values
        samples = self._sampled(values.parts)
        return Values(self.sample_grid, self.sample_grid.flat(samples, samples[0].dtype))

    # -- the tensors of Algorithm 4 ----------------------------------------------------------------------------------

    def x(self) -> Tensor:
        """Returns a copy of ``x``, flat, with 0 where it is not finite."""
        x = self.flat("p0").add_(self.flat("delta")) if self.displaced else self.flat("x")
        return x.nan_to_num_(0.0, 0.0, 0.0)

    def mend_displacement(self) -> None:
        """Has a displacement that no longer fits its parameter start anew."""
        x0, delta, p = self.flat("p0"), self.flat("delta"), self.flat("x")
        fits = (x0 + delta).to(self.slot.param.dtype) == p
        mended = Values(self.grid, torch.where(fits, delta, p.sub_(x0)))
        torch._foreach_copy_(self.stored("delta"), mended.parts)

    def distances(self) -> Values:
        """Returns ``x0 - x`` at the sampled positions, new tensors."""
        if self.displaced or self.slot.moves_in_codes:
            return Values(self.grid, self.values("delta").joined().neg())
        if self.sample_grid is self.grid:
            return self.values("p0").apply("sub", self.values("x"))
        if self.extended:
            x = self.sampled(Values(self.grid, self.flat("x"))).joined()
            return Values(self.sample_grid, self.sample_grid.flat(self.stored("p0"), self.dtype).sub_(x))
        x0, x = (self.sample_grid.flat(tensors, self.dtype) for tensors in (self.stored("p0"), self._samples))
        return Values(self.sample_grid, x0.sub_(x))

    def gradients(self, grad_scale: float) -> Values:
        """Returns ``g``, not to be changed: unscaled, of the minimised objective, with coupled weight decay."""
        scale = (-1.0 if self.h.maximize else 1.0) * (1 / grad_scale if grad_scale else math.inf)
        coupled = self.h.weight_decay and not self.h.decouple
        if scale == 1 and not coupled:
            return self.values("grad")
        g = self.flat("grad").mul_(scale)
        return Values(self.grid, g.add_(self.x(), alpha=self.h.weight_decay) if coupled else g)

    def finite(self, g: Values) -> Values:
        """Returns ``g`` with 0 where it is not finite. On a CPU it is cheaper to look whether there is such a place."""
        if self.on_host and math.isfinite(g.joined().sum().item()):
            return g
        return Values(self.grid, g.joined().nan_to_num(0.0, 0.0, 0.0))

    def subtract(self, m: Values, denominators: Values, factor: float, decay: Any, k: Any) -> None:
        """Subtracts ``factor * m / denominators + decay * x`` from ``x``."""
        key = "delta" if self.displaced else "x"
        x = self.values(key)
        before = self.flat("x") if self.slot.moves_in_codes else None
        if self.h.weight_decay and self.h.decouple:
            x.apply("sub_", Values(self.grid, self.x().mul_(decay)))
        x.apply("addcdiv_", m, denominators, value=-factor)
        self.store(key, x, k)
        if before is not None:
            moved = self.flat("x").sub_(before).nan_to_num_(0.0, 0.0, 0.0)
            self.store("delta", Values(self.grid, self.values("delta").joined().add_(moved)), k)
        if self.displaced:
            self.store("x", Values(self.grid, self.flat("p0").add_(x.joined())), k)
