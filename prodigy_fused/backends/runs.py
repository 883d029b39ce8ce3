"""Runs of pieces: what the operations of foreach work on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import eight_bits
from ..eight_bits import CODES, Code, blocks_of
from ..hyper import Hyper
from ..options import SIXTEEN_BIT
from ..rounding import (
    consecutive_bits,
    first,
    fourth,
    kept_value,
    row_bits,
    second,
    stochastic,
    stochastic_24,
    third,
)
from ..sums import ROW
from .elementwise import arithmetic
from .flat import Grid, Values
from .pieces import SAMPLED, Piece, RowTable, row_table

# Of numbers that operations multiply tensors by: they raise if float32 cannot hold one, and what has the square of one
# as a factor may overflow before it is divided.
MOST = 1e18
DRAWS: dict[str, Callable[..., Tensor]] = {"x": first, "exp_avg_sq": second, "s": third, "delta": fourth}


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
        self.has_copies = any(piece.copied for piece in pieces)
        self.xs = [piece.x for piece in pieces]
        self._stored = {"x": self.xs, "grad": [piece.grad for piece in pieces]}
        self._own: dict[str, Values] = {}
        self.grid = Grid(self.xs, self.slot.coded or not on_host)
        self._bits: Tensor | None = None
        self._scale: tuple[Tensor, list[Tensor]] | None = None
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
        if key not in self._stored:
            self._stored[key] = found = [piece.state[key] for piece in self.pieces]
            if key == "p0":  # a number if x0 is zero everywhere
                likes = self.xs if self.displaced else self._samples
                found[:] = [t if t.dim() else t.expand(like.shape) for t, like in zip(found, likes, strict=True)]
        return self._stored[key]

    def values(self, key: str) -> Values:
        """Returns values that may be changed, and then are to be stored: where possible the tensors themselves."""
        if key in self._own:
            return self._own[key]
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
            own = Values(grid, first.reshape(-1) if key == "grad" else first.view(-1))
        else:
            own = Values(grid, parts=tensors)
        self._own[key] = own
        return own

    def root(self) -> Values:
        """Returns the root of ``v``, new tensors."""
        if self.slot.has_codes_of("exp_avg_sq"):
            return Values(self.grid, eight_bits.decode(*self._codes("exp_avg_sq")))
        return self.values("exp_avg_sq").apply("sqrt")

    def flat(self, key: str) -> Tensor:
        """Returns a copy; of 24 bits, the kept value."""
        if key == "x" and self.extended:
            return self._kept(self.grid, self.xs, self.stored("low"))
        return self.grid.flat(self.stored(key), self.dtype)

    @staticmethod
    def _kept(grid: Grid, xs: list[Tensor], lows: list[Tensor]) -> Tensor:
        if len(xs) == 1:
            return kept_value(xs[0].reshape(-1), lows[0].reshape(-1))
        return kept_value(grid.flat(xs, xs[0].dtype), grid.flat(lows, torch.int8))

    def store(self, key: str, values: Values, k: Any) -> None:
        """Stores what :meth:`values` returned and was changed since."""
        if key in self._own:
            return
        if self.slot.has_codes_of(key):
            self._store_codes(key, values, k)
            return
        tensors = self.stored(key)
        dtype = tensors[0].dtype
        flat = values.joined()
        if key == "x" and self.extended:
            flat, low = stochastic_24(flat, self._bits_of(k))
            self._put("low", low, values)
        if dtype in SIXTEEN_BIT and (
            key in ("exp_avg_sq", "s") or (key, self.slot.low_precision) == ("x", "stochastic")
        ):
            flat = stochastic(flat, dtype, self._bits_for(key, k), DRAWS[key])
        self._put(key, flat, values)

    def _put(self, key: str, flat: Tensor, values: Values) -> None:
        """Copies a flat tensor to those of the state, or x."""
        tensors = self.stored(key)
        if len(tensors) == 1:
            tensors[0].copy_(flat.view(tensors[0].shape))
            return
        flat = flat.to(tensors[0].dtype)
        torch._foreach_copy_(tensors, values.parts if flat is values.flat else values.grid.parts(flat))

    def _codes(self, key: str) -> tuple[Code, Tensor, Tensor]:
        """Returns what the codes of the run are, the codes, flat, and their column of scale."""
        code, tensors = CODES[key], self.stored(key)
        codes = tensors[0].view(-1) if len(tensors) == 1 else self.grid.flat(tensors, code.storage)
        return code, codes, self._scales()[0][:, code.column]

    def _scales(self) -> tuple[Tensor, list[Tensor]]:
        """Returns the scale of all blocks of the grid, and the parts of it that tensors have, none if there is one."""
        if self._scale is None:
            stored = self.stored("scale")
            if len(stored) == 1:
                self._scale = stored[0], []
            else:
                blocks = [blocks_of(rows * ROW) for rows in self.grid.rows]
                scale = stored[0].new_zeros(sum(blocks), len(CODES))
                parts = [part[: len(t)] for part, t in zip(torch.split(scale, blocks), stored, strict=True)]
                torch._foreach_copy_(parts, stored)
                self._scale = scale, parts
        return self._scale

    def _store_codes(self, key: str, values: Values, k: Any) -> None:
        code, flat = CODES[key], values.joined()
        flat = flat.sqrt() if key == "exp_avg_sq" else flat
        bits = None if key == "exp_avg" else self._bits_for(key, k)
        codes, column = eight_bits.encode(code, flat, bits, draw=DRAWS.get(key, first))
        self._put(key, codes, values)
        scale, parts = self._scales()
        scale[:, code.column] = column
        if parts:
            torch._foreach_copy_(self.stored("scale"), parts)

    def _bits_for(self, key: str, k: Any) -> Tensor:
        """Returns the random bits of the elements that a tensor has."""
        bits = self._bits_of(k)
        return self.sampled(Values(self.grid, bits)).joined() if key == "s" else bits

    def _bits_of(self, k: Any) -> Tensor:
        if self._bits is None:
            slot, device = self.slot, self.slot.param.device
            if len(self.pieces) == 1:
                at = slot.random_base + self.pieces[0].begin, self.grid.length
                self._bits = consecutive_bits(k, slot.random_index, *at, device)
            else:
                names = tuple((piece.slot.index, piece.begin) for piece in self.pieces)
                table = self._tables.get(names) or row_table(self.pieces, self.grid.rows, device)
                if device.type != "cpu":
                    self._tables[names] = table
                self._bits = self.grid.of_rows(row_bits(k, *table, lead=slot.random_base % 8))
        return self._bits

    def sizes(self, s: Values) -> Tensor:
        """Returns the absolute values, a new flat tensor."""
        room = s.grid.room(self.dtype)
        if room is not None:
            return room.assign("abs", s).joined()
        return s.joined().abs_() if s.flat is None else s.flat.abs()

    def forget(self) -> None:
        """Frees the memory of what was made for one phase."""
        self._bits = self._scale = None
        self.grid.forget_room()
        if not self.slot.frozen:
            self.sample_grid.forget_room()

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
        x0, delta, p = self.flat("p0"), self.values("delta").joined(), self.grid.flat(self.xs, self.slot.param.dtype)
        words, kept = ((x0 + delta).to(p.dtype).view(torch.int16), p.view(torch.int16))
        if self.on_host and torch.equal(words, kept):
            return
        fits = words.view(p.dtype) == p
        self._put("delta", torch.where(fits, delta, p.to(self.dtype).sub_(x0)), Values(self.grid))

    def distances(self) -> Values:
        """Returns ``x0 - x`` at the sampled positions, a new flat tensor."""
        grid = self.sample_grid
        if self.displaced or self.slot.moves_in_codes:
            return Values(self.grid, self.values("delta").joined().neg())
        if grid is not self.grid:
            if self.extended:
                x = self._kept(grid, self._samples, self._sampled(self.stored("low")))
            else:
                x = grid.flat(self._samples, self.dtype)
            return Values(grid, grid.flat(self.stored("p0"), self.dtype).sub_(x))
        x0, now = self.values("p0"), self.values("x")
        room = grid.room(self.dtype)
        if room is not None:
            return room.assign("sub", x0, now)
        if x0.flat is not None and now.flat is not None:
            return x0.apply("sub", now)
        return Values(grid, x0.joined()).apply("sub_", now)

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
        if self.on_host:
            parts = g.parts if g.flat is None else [g.flat]
            if all(math.isfinite(part.sum().item()) for part in parts):
                return g
        return Values(g.grid, g.joined().nan_to_num(0.0, 0.0, 0.0))

    def subtract(self, m: Values, denominators: Values, factor: float, decay: Any, k: Any) -> None:
        """Subtracts ``factor * m / denominators + decay * x`` from ``x``."""
        key = "delta" if self.displaced else "x"
        x = self.values(key)
        before = self.flat("x") if self.slot.moves_in_codes else None
        if self.h.weight_decay and self.h.decouple:
            x.apply("sub_", Values(self.grid, self.x().mul_(decay)))
        if factor <= MOST:
            x.apply("addcdiv_", m, denominators, value=-factor)
        else:
            quotients = m.apply("div", denominators).joined()
            x.apply("sub_", Values(self.grid, quotients * factor))
        self.store(key, x, k)
        if before is not None:
            moved = self.flat("x").sub_(before).nan_to_num_(0.0, 0.0, 0.0)
            self.store("delta", Values(self.grid, self.values("delta").joined().add_(moved)), k)
        if self.displaced:
            self.store("x", Values(self.grid, self.flat("p0").add_(x.joined())), k)
