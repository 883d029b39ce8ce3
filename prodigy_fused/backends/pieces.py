"""Parameters in pieces, and runs of pieces: what the operations of foreach work on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hyper import Hyper
from ..options import SIXTEEN_BIT
from ..rounding import EIGHTS, row_bits, second, stochastic, third
from ..step import Slot
from ..sums import ROW
from ..tensors import is_dense, same_layout, sampled
from .elementwise import arithmetic
from .flat import Grid, Values, finite_or_zero_, lists, write

RowTable = tuple[Tensor, Tensor]


class Piece(NamedTuple):
    """A parameter with its gradient, or a range of its elements in the order of memory."""

    slot: Slot
    grad: Tensor
    permuted: bool  # dense, with the dimensions in another order (channels_last): taken in the order of memory
    begin: int = 0  # a multiple of ROW * slice_p
    end: int | None = None  # None: the piece is the whole tensor

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.grad.numel() if self.end is None else self.end - self.begin

    def of(self, t: Tensor) -> Tensor:
        """Returns the piece's elements of a tensor that has the parameter's shape and layout, a view."""
        if self.permuted:
            t = t.as_strided((t.numel(),), (1,), t.storage_offset())
        return t if self.end is None else t.view(-1)[self.begin : self.end]

    def sampled(self, elements: Tensor) -> Tensor:
        """Returns the sampled ones among the elements that :meth:`of` returned, or other values of those."""
        if self.slot.slice_p > 1 and self.permuted:  # samples are counted in row-major order
            p = self.slot.param
            elements = elements.as_strided(p.shape, p.stride(), elements.storage_offset())
        return sampled(elements, self.slot.slice_p)

    def samples(self, key: str, like: Tensor) -> Tensor:
        """Returns the piece's elements of a state tensor that has one per sample.

        Args:
            like: as many elements as the piece has samples.
        """
        t: Tensor = self.slot.state[key]
        if t.dim() == 0:  # x0 is zero everywhere
            return t.expand(like.shape)
        if self.slot.slice_p == 1:
            return self.of(t)
        first = self.begin // self.slot.slice_p
        return t if self.end is None else t[first : first + like.numel()]


def pieces_of(slot: Slot, grad: Tensor, most: int) -> list[Piece]:
    """Returns a parameter in pieces of at most ``most`` elements, if it can be cut.

    They begin at multiples of whole rows of samples, so that the sums of rows do not depend on ``most``.
    """
    p = slot.param
    contiguous = p.is_contiguous()
    permuted = not contiguous and is_dense(p)
    if permuted and not same_layout(grad, p):
        grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
    if p.numel() <= most or not (contiguous or (permuted and slot.slice_p == 1)):
        return [Piece(slot, grad, permuted)]
    if contiguous:
        grad = grad.contiguous()
    unit = ROW * slot.slice_p
    size = max(most // unit, 1) * unit
    return [Piece(slot, grad, permuted, i, min(i + size, p.numel())) for i in range(0, p.numel(), size)]


def row_table(pieces: list[Piece], rows: list[int], device: torch.device) -> RowTable:
    """Returns, for each row of a grid, the parameter's index for random bits, and the row's place in memory divided
    by 8, both int64. Does not wait for the device."""
    counts = torch.tensor(rows)
    index, begin = torch.tensor([(piece.slot.random_index, piece.begin // 8) for piece in pieces]).T
    begin -= (counts.cumsum(0) - counts) * EIGHTS
    index, begin = (t.repeat_interleave(counts) for t in (index, begin))
    begin += torch.arange(len(begin)) * EIGHTS
    return index.to(device, non_blocking=True), begin.to(device, non_blocking=True)


class Run:
    """Pieces of tensors with the same options, which are stepped together."""

    def __init__(self, pieces: list[Piece], h: Hyper, gathers: bool, tables: dict[Any, RowTable]) -> None:
        """Takes the pieces.

        Args:
            gathers: whether the state, too, is copied to flat tensors, and back.
            tables: what is kept from step to step for random bits.
        """
        self.pieces, self.h, self.slot = pieces, h, pieces[0].slot
        self.dtype = arithmetic(self.slot.param)
        self.displaced = self.slot.low_precision == "displacement"
        self._gathers, self._tables = gathers and len(pieces) > 1, tables
        self._params = self._of_all("of", [piece.slot.param for piece in pieces])
        self.grid = Grid(self._params)
        self._bits: Tensor | None = None
        if not self.slot.frozen:
            self._samples = self._of_all("sampled", self._params)
            self.sample_grid = self.grid if self.slot.slice_p == 1 else Grid(self._samples)

    def _of_all(self, method: str, tensors: list[Tensor]) -> list[Tensor]:
        return [getattr(piece, method)(t) for piece, t in zip(self.pieces, tensors, strict=True)]

    # -- values ------------------------------------------------------------------------------------------------------

    def flat(self, tensors: list[Tensor]) -> Tensor:
        """Returns a copy of tensors of the parameters' shapes."""
        return self.grid.flat(tensors, self.dtype)

    def stored(self, key: str) -> list[Tensor]:
        """Returns the state's tensors themselves."""
        if key == "s":
            return [piece.samples(key, like) for piece, like in zip(self.pieces, self._samples, strict=True)]
        return self._of_all("of", [piece.slot.state[key] for piece in self.pieces])

    def values(self, grid: Grid, tensors: list[Tensor]) -> Values:
        """Returns values that may be changed, and then are to be written: if possible, the tensors themselves."""
        if tensors[0].dtype == self.dtype and not self._gathers:
            return Values(grid, parts=tensors)
        return Values(grid, grid.flat(tensors, self.dtype))

    def state(self, key: str) -> Values:
        """Returns values of the state that may be changed, and then are to be stored."""
        return self.values(self.sample_grid if key == "s" else self.grid, self.stored(key))

    def store(self, key: str, values: Values, k: Any) -> None:
        """Stores what :meth:`state` returned and was changed since."""
        tensors = self.stored(key)
        if key != "exp_avg" and tensors[0].dtype in SIXTEEN_BIT:
            bits = second(self.bits(k)) if key == "exp_avg_sq" else third(self.sampled(self.bits(k)))
            values = Values(values.grid, stochastic(values.joined(), tensors[0].dtype, bits))
        write(tensors, values)

    def sampled(self, flat: Tensor) -> Tensor:
        """Returns the samples among the elements of a flat tensor: itself, if that is all of them."""
        if self.sample_grid is self.grid:
            return flat
        return self.sample_grid.flat(self._of_all("sampled", self.grid.parts(flat)), flat.dtype)

    def bits(self, k: Any) -> Tensor:
        """Returns the random bits of a step, flat."""
        if self._bits is None:
            key = tuple((piece.slot.index, piece.begin) for piece in self.pieces)
            device = self.slot.param.device
            table = self._tables.get(key) or row_table(self.pieces, self.grid.rows, device)
            if device.type != "cpu":
                self._tables[key] = table
            self._bits = row_bits(k, *table)
        return self._bits

    # -- the tensors of Algorithm 4 ----------------------------------------------------------------------------------

    def x(self) -> Tensor:
        """Returns a copy of ``x``."""
        if self.displaced:
            return self._x0().add_(self.flat(self.stored("delta")))
        return self.flat(self._params)

    def _x0(self) -> Tensor:
        likes = zip(self.pieces, self._params, strict=True)
        return self.flat([piece.samples("p0", like) for piece, like in likes])

    def mend_displacement(self) -> None:
        """Has a displacement that no longer fits its parameter start anew."""
        x0, delta = self._x0(), self.flat(self.stored("delta"))
        p = self.grid.flat(self._params, self.slot.param.dtype)
        fits = (x0 + delta).to(p.dtype) == p
        write(self.stored("delta"), Values(self.grid, torch.where(fits, delta, x0.neg_().add_(p))))

    def distances(self) -> Tensor:
        """Returns ``x0 - x`` at the sampled positions, a new tensor."""
        if self.displaced:
            return self.flat(self.stored("delta")).neg_()
        x0s = [piece.samples("p0", like) for piece, like in zip(self.pieces, self._samples, strict=True)]
        distances = Values(self.sample_grid, self.sample_grid.flat(x0s, self.dtype))
        if self.sample_grid is self.grid:
            x = self.values(self.grid, self._params)
        else:  # views with gaps, which torch would take one by one
            x = Values(self.sample_grid, self.sample_grid.flat(self._samples, self.dtype))
        differences, xs = lists(distances, x)
        torch._foreach_sub_(differences, xs)
        return distances.joined()

    def gradients(self, grad_scale: float) -> Tensor:
        """Returns ``g``, a new tensor: unscaled, of the minimised objective, with coupled weight decay."""
        grads = self._of_all("of", [piece.grad for piece in self.pieces])
        scale = (-1.0 if self.h.maximize else 1.0) / grad_scale
        g = self.flat(grads)
        if scale != 1:
            g.mul_(scale)
        if self.h.weight_decay and not self.h.decouple:
            g.add_(finite_or_zero_(self.x()), alpha=self.h.weight_decay)
        return g

    def subtract(self, m: Values, denominators: Tensor, decay: Any, k: Any) -> None:
        """Subtracts ``m / denominators + decay * x`` from ``x``."""
        x0 = self._x0() if self.displaced else None
        x = (
            Values(self.grid, self.flat(self.stored("delta")))
            if self.displaced
            else self.values(self.grid, self._params)
        )
        if self.h.weight_decay and self.h.decouple:
            decays = Values(self.grid, finite_or_zero_(self.x()).mul_(decay))
            xs, ys = lists(x, decays)
            torch._foreach_sub_(xs, ys)
            del decays, ys
        xs, ms, quotients = lists(x, m, Values(self.grid, denominators))
        torch._foreach_addcdiv_(xs, ms, quotients, value=-1)
        if x0 is not None:
            write(self.stored("delta"), x)
            x = Values(self.grid, x0.add_(x.joined()))
        elif self.slot.low_precision == "stochastic":
            x = Values(self.grid, stochastic(x.joined(), self.slot.param.dtype, self.bits(k)))
        write(self._params, x)
