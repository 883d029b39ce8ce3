"""Many tensors as one flat tensor, so that one operation covers them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..sums import ROW, row_sums

MANY_ROWS = 8  # of a tensor: zeros that fill the last one are few then


class Grid:
    """How the elements of some tensors lie in a flat one: one after the other, or each from the beginning of a row.

    Args:
        like: tensors of their shapes.
        fills: whether zeros fill the last row of each tensor; else they do where that is little.
    """

    def __init__(self, like: list[Tensor], fills: bool) -> None:
        self._like = like
        self.sizes = [t.numel() for t in like]
        self.rows = [-(-size // ROW) for size in self.sizes]
        self._gaps = [rows * ROW - size for rows, size in zip(self.rows, self.sizes, strict=True)]
        self._fills = fills
        self._room: Tensor | None = None
        self._has_gaps = len(like) > 1 and any(self._gaps)
        self._is_filled = self._has_gaps and (fills or sum(self.rows) >= MANY_ROWS * len(like))
        self.length = ROW * sum(self.rows) if self._is_filled else sum(self.sizes)
        if self._is_filled:
            self._like = self._filled(like)

    def _filled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors, each with the zeros that follow it."""
        zeros = torch.zeros(ROW, dtype=tensors[0].dtype, device=tensors[0].device)
        fillings = {gap: zeros[:gap] for gap in set(self._gaps)}
        filled = [t for t in tensors for _ in range(2)]
        filled[1::2] = map(fillings.__getitem__, self._gaps)
        return filled

    def flat(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the elements of the tensors, which need not have the shapes, in a new flat tensor."""
        if len(tensors) == 1:
            return tensors[0].reshape(-1).to(dtype, copy=True)
        tensors = self._filled(tensors) if self._is_filled else tensors
        joined: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
        return joined.to(dtype)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Returns views of a flat tensor, with the tensors' shapes."""
        views = list(_unflatten_dense_tensors(flat, self._like))  # type: ignore[no-untyped-call]
        return views[::2] if self._is_filled else views

    def room(self, dtype: torch.dtype) -> Values | None:
        """Returns values that may be overwritten, on a CPU where :meth:`row_sums` then needs no copy; their memory is
        the same until :meth:`forget_room`."""
        if self._room is None and not self._fills and (self._is_filled or not self._has_gaps):
            self._room = torch.zeros(ROW * sum(self.rows), dtype=dtype, device=self._like[0].device)
        return None if self._room is None else Values(self, self._room[: self.length])

    def forget_room(self) -> None:
        """Frees the memory of :meth:`room`."""
        self._room = None

    def row_sums(self, flat: Tensor) -> Tensor:
        """Returns the sums of rows of a flat tensor, each tensor beginning a row."""
        if self._room is not None and flat.data_ptr() == self._room.data_ptr():
            return row_sums(self._room)
        if self._has_gaps and not self._is_filled:
            flat = torch.cat(self._filled(torch.split(flat, self.sizes)))
        return row_sums(flat)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Returns the elements of whole rows, without those beyond the tensors' unless zeros fill their place."""
        if self._is_filled:
            return rows
        if self._has_gaps:
            sizes_and_gaps = [n for pair in zip(self.sizes, self._gaps, strict=True) for n in pair]
            return torch.cat(torch.split(rows, sizes_and_gaps)[::2])
        return rows[: self.length]


class Values:
    """Values in the precision of the arithmetic: a flat tensor, or one tensor for each of a grid."""

    def __init__(self, grid: Grid, flat: Tensor | None = None, parts: list[Tensor] | None = None) -> None:
        self.grid, self.flat, self._parts = grid, flat, parts

    @property
    def parts(self) -> list[Tensor]:
        """One tensor for each of the grid; views, if there is a flat one."""
        if self._parts is None:
            self._parts = self.grid.parts(self.joined())
        return self._parts

    def joined(self) -> Tensor:
        """Returns the flat tensor, or else a copy of the tensors in one."""
        if self.flat is None:
            return self.grid.flat(self.parts, self.parts[0].dtype)
        return self.flat

    def apply(self, name: str, *operands: Values | float, **options: float) -> Values:
        """Calls an operation, by its name as a method of a tensor: on the flat tensors, or ``torch._foreach_`` one.

        Returns:
            What it returns; itself if it works in place.
        """
        flats = self._flats(operands)
        if self.flat is None or flats is None:
            lists = [value.parts if isinstance(value, Values) else value for value in operands]
            parts = getattr(torch, f"_foreach_{name}")(self.parts, *lists, **options)
            return self if name.endswith("_") else Values(self.grid, parts=parts)
        flat = getattr(self.flat, name)(*flats, **options)
        return self if flat is self.flat else Values(self.grid, flat)

    def assign(self, name: str, *operands: Values) -> Values:
        """Sets itself to the result of an operation of ``torch``; on a CPU."""
        flats = self._flats(operands)
        function = getattr(torch, name)
        if flats is not None:
            function(*flats, out=self.flat)
        else:
            for out, *tensors in zip(self.parts, *(value.parts for value in operands), strict=True):
                function(*tensors, out=out)
        return self

    @staticmethod
    def _flats(operands: Sequence[Values | float]) -> list[Tensor | float] | None:
        flats: list[Tensor | float] = []
        for value in operands:
            flat = value.flat if isinstance(value, Values) else value
            if flat is None:
                return None
            flats.append(flat)
        return flats
