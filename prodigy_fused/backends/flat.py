"""Many tensors as one flat tensor, so that one operation covers them all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..sums import ROW


class Grid:
    """How the elements of some tensors lie in a flat one: each tensor begins a row, and zeros fill its last one."""

    def __init__(self, like: list[Tensor]) -> None:
        self.rows = [-(-t.numel() // ROW) for t in like]
        self._gaps = [rows * ROW - t.numel() for rows, t in zip(self.rows, like, strict=True)]
        self._like = self._padded(like)

    def _padded(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the tensors with zeros after each, if there are gaps to fill."""
        if not any(self._gaps):
            return tensors
        zeros = torch.zeros(ROW, dtype=tensors[0].dtype, device=tensors[0].device)
        fillings = {gap: zeros[:gap] for gap in set(self._gaps)}
        padded = [t for t in tensors for _ in range(2)]
        padded[1::2] = map(fillings.__getitem__, self._gaps)
        return padded

    def flat(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the elements of the tensors, which need not have the shapes, in a new flat tensor."""
        padded = self._padded(tensors)
        if len(padded) == 1:
            return padded[0].reshape(-1).to(dtype, copy=True)
        joined: Tensor = _flatten_dense_tensors(padded)
        return joined.to(dtype)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Returns views of a flat tensor, with the tensors' shapes."""
        views = list(_unflatten_dense_tensors(flat, self._like))
        return views[::2] if any(self._gaps) else views


class Values:
    """Values in the precision of the arithmetic: a flat tensor, or the tensors of the state themselves."""

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


def lists(*values: Values) -> list[list[Tensor]]:
    """Returns a list of tensors for each of the values, to be used with each other in ``torch._foreach_*``."""
    flats = [[value.flat] for value in values if value.flat is not None]
    return flats if len(flats) == len(values) else [value.parts for value in values]


def write(tensors: list[Tensor], values: Values) -> None:
    """Writes values to tensors, if they are not those."""
    if values.flat is not None:
        flat = values.flat.to(tensors[0].dtype)
        torch._foreach_copy_(tensors, values.parts if flat is values.flat else values.grid.parts(flat))


def finite_or_zero_(t: Tensor) -> Tensor:
    """Sets elements that are not finite to 0, in place."""
    return t.nan_to_num_(0.0, 0.0, 0.0)
