"""Many tensors as one flat tensor, so that one operation covers them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..sums import ROW, row_sums


class Grid:
    """How the elements of some tensors lie in a flat one: one after the other, or each from the beginning of a row.

    Args:
        like: tensors of their shapes.
        fills: whether zeros fill the last row of each tensor.
    """

    def __init__(self, like: list[Tensor], fills: bool) -> None:
        self._like = like
        self.sizes = [t.numel() for t in like]
        self.rows = [-(-size // ROW) for size in self.sizes]
        self._gaps = [rows * ROW - size for rows, size in zip(self.rows, self.sizes, strict=True)]
        self._has_gaps = len(like) > 1 and any(self._gaps)
        self._is_filled = fills and self._has_gaps
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

    def row_sums(self, flat: Tensor) -> Tensor:
        """Returns the sums of rows of a flat tensor, each tensor beginning a row."""
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
        return rows[: sum(self.sizes)]


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
        others = [value for value in operands if isinstance(value, Values)]
        if self.flat is None or any([value.flat is None for value in others]):
            lists = [value.parts if isinstance(value, Values) else value for value in operands]
            parts = getattr(torch, f"_foreach_{name}")(self.parts, *lists, **options)
            return Values(self.grid, parts=parts) if parts else self
        flats = [value.flat if isinstance(value, Values) else value for value in operands]
        flat = getattr(self.flat, name)(*flats, **options)
        return self if flat is self.flat else Values(self.grid, flat)
