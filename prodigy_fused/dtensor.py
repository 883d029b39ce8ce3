"""What this rank has of a DTensor, and where in the whole tensor it is.

torch.distributed.tensor is imported only where a tensor is a DTensor.

Note [Global index]
Element i of a shard, in row-major order, is element g(i) of the whole tensor, in row-major order. Samples (``slice_p``)
and the random bits of a shard go by g, so that a sharded run samples and rounds as the unsharded one does. With one
dimension split, or two of which one is the first, an :class:`IndexMap` is *affine*::

    g(i) = base + i // length * pitch + i % length

Else (a dimension that is split twice in an interleaved way, as by FSDP2 on top of tensor parallelism; two inner
dimensions) the indices are computed as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = (torch.nn.Parameter, Tensor)


def is_dtensor(t: Tensor) -> bool:
    """Returns whether a tensor is a DTensor."""
    return type(t) not in _PLAIN and hasattr(t, "device_mesh") and hasattr(t, "placements")


def local(t: Tensor) -> Tensor:
    """Returns the tensor of this rank's elements: ``t`` itself, unless it is a DTensor. Waits for no one."""
    return t._local_tensor if is_dtensor(t) else t  # type: ignore[attr-defined]


def ready(t: Tensor) -> Tensor:
    """Returns ``t``, or what it stands for if it is the result of a collective that may still run."""
    return t.wait() if type(t).__name__ == "AsyncCollectiveTensor" else t  # type: ignore[attr-defined]


def is_partial(t: Tensor) -> bool:
    """Returns whether a DTensor's values are terms that are still to be added up over ranks."""
    return any(placement.is_partial() for placement in t.placements)  # type: ignore[attr-defined]


class Affine(NamedTuple):
    """The numbers of an affine map, see Note [Global index]."""

    base: int
    length: int
    pitch: int


class IndexMap:
    """The map from the elements of a shard to those of the whole tensor, see Note [Global index].

    Args:
        shape: the whole tensor's.
        own: of each dimension the indices that this rank has, ascending, int64 on the CPU; None: all.
    """

    def __init__(self, shape: Sequence[int], own: Sequence[Tensor | None]) -> None:
        everything = [torch.arange(size, device="cpu") for size in shape]
        self._own = [every if mine is None else mine for every, mine in zip(everything, own, strict=True)]
        self._strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        self.shape, self.whole = torch.Size(map(len, self._own)), math.prod(shape)  # and the whole tensor's elements
        split = [d for d, size in enumerate(shape) if len(self._own[d]) < size]
        self.is_identity = not split
        self.affine = self._affine(shape, split)
        # Whether the elements are consecutive ones of the whole: g(i) = base + i.
        self.is_shift = self.affine is not None and self.affine.length >= self.shape.numel()
        self._samples: dict[tuple[int, torch.device], slice | Tensor] = {}

    def _affine(self, shape: Sequence[int], split: list[int]) -> Affine | None:
        if not split or 0 in self.shape:
            return Affine(0, 1, 1)
        first = next(d for d, size in enumerate(shape) if size > 1)
        runs = all(int(mine[-1]) - int(mine[0]) == len(mine) - 1 for mine in self._own)
        *outer, inner = split
        if not runs or any(d != first for d in outer):
            return None
        base = sum(int(self._own[d][0]) * self._strides[d] for d in split)
        return Affine(base, math.prod(self.shape[inner:]), math.prod(shape[inner:]))

    @property
    def is_short_shift(self) -> bool:
        """Whether the map is a shift, and the indices agree in all but their low 35 bits: their random bits then have
        one ``word`` (Note [Random bits] in rounding.py), as those of a run of elements have elsewhere."""
        if self.affine is None or not self.is_shift:
            return False
        return self.affine.base >> 35 == self.affine.base + max(self.shape.numel() - 1, 0) >> 35

    def indices(self, device: torch.device) -> Tensor:
        """Returns g of every element: int64 of the shard's shape."""
        g = torch.zeros((), dtype=torch.int64, device=device)
        for d, (mine, stride) in enumerate(zip(self._own, self._strides, strict=True)):
            g = g + (mine * stride).to(device).view(-1, *[1] * (len(self._own) - d - 1))
        return g

    def samples(self, slice_p: int, device: torch.device) -> slice | Tensor:
        """Returns which elements of the flattened shard are samples: those whose g is a multiple of ``slice_p``."""
        if self.affine is not None and self.is_shift:
            return slice(-self.affine.base % slice_p, None, slice_p)
        key = slice_p, device
        if key not in self._samples:
            self._samples[key] = (self.indices(device).flatten() % slice_p == 0).nonzero().flatten()
        return self._samples[key]

    def sample_count(self, slice_p: int) -> int:
        """Returns how many elements of the shard are samples."""
        which = self.samples(slice_p, torch.device("cpu"))
        return len(range(*which.indices(self.shape.numel()))) if isinstance(which, slice) else len(which)


def samples_of(where: IndexMap | None, slice_p: int, device: torch.device) -> slice | Tensor:
    """Returns which elements of a flattened tensor are samples; ``where`` is its index map, if it is a shard."""
    return slice(None, None, slice_p) if where is None else where.samples(slice_p, device)


def index_map(p: Tensor) -> IndexMap | None:
    """Returns where this rank's elements of a parameter are in the whole one; None if it has all of them."""
    if not is_dtensor(p):
        return None
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    own: list[Tensor | None] = [None] * p.dim()
    for size, here, placement in zip(mesh.shape, coordinate or [0] * mesh.ndim, p.placements, strict=True):  # type: ignore[attr-defined]
        if not hasattr(placement, "dim"):
            continue
        d = placement.dim % p.dim()
        mine = own[d]
        line = (torch.arange(p.shape[d], device="cpu") if mine is None else mine).view([1] * d + [-1])
        pieces, _ = placement._split_tensor(line, size, with_padding=False, contiguous=False)
        own[d] = pieces[here].flatten() if coordinate is not None else line.new_empty(0)
    found = IndexMap(p.shape, own)
    return None if found.is_identity else found


# -- state dictionaries ------------------------------------------------------------------------------------------------


def wrap(value: Tensor, p: Tensor, samples: slice | Tensor | None) -> Tensor:
    """Returns a tensor of the state of a DTensor as a DTensor of the parameter's mesh and placements.

    Args:
        value: this rank's part of it; or one number, for all elements.
        p: the parameter.
        samples: of packed samples, where they are in this rank's part; those between them are 0 in the result. (Packed
            ones could not be a DTensor: how many each rank has does not follow the rule of any placement.)
    """
    from torch.distributed.tensor import DTensor

    mine = local(p)
    if samples is not None and value.dim() > 0:
        whole = value.new_zeros(mine.numel())
        whole[samples] = value.flatten()
        value = whole
    value = value.view(mine.shape) if value.numel() == mine.numel() else value.expand(mine.shape).contiguous()
    return DTensor.from_local(
        value,
        p.device_mesh,  # type: ignore[attr-defined]
        p.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def _placed(t: Any) -> Any:
    return (t.device_mesh, t.placements) if is_dtensor(t) else None


def unwrap(value: Tensor, p: Tensor, where: IndexMap | None, slice_p: int) -> Tensor:
    """Returns this rank's part of a state tensor that a checkpoint has as a whole, or as a DTensor.

    A DTensor with other placements is gathered first, so that all ranks must load at the same time.

    Args:
        value: of the parameter's shape, or flat; or the packed samples of the whole parameter; or one number.
        p: the parameter.
        where: its index map, if it is a shard.
        slice_p: of a tensor that has samples only, else 1.
    """
    if is_dtensor(value):
        if value.shape == p.shape and _placed(value) == _placed(p):
            part = local(value)
            return part if slice_p == 1 else part.flatten()[samples_of(where, slice_p, part.device)]
        value = value.full_tensor()  # type: ignore[attr-defined]
    packed = value.shape == (-(-p.numel() // slice_p),)
    if value.dim() == 0 or value.layout != torch.strided or not (packed or value.numel() == p.numel()):
        return value
    if where is None:
        return value if packed or slice_p == 1 else value.flatten()[::slice_p]
    g = where.indices(value.device).flatten()
    if slice_p == 1:
        return value.flatten()[g].view(where.shape)
    g = g[where.samples(slice_p, value.device)]
    return value.flatten()[g // slice_p if packed else g]
