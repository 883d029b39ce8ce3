"""Gradients of DTensors as this rank's tensors, with the placements of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dtensor import is_dtensor, local, ready


def local_gradients(params: Sequence[Tensor], grads: list[Any] | None = None) -> list[Tensor | None]:
    """Returns the gradients of parameters, or those that are given: of a DTensor, the part that fits the parameter's
    own.

    What backward leaves to be added up over ranks (sequence parallelism does so with the norms' gradients) is added up
    here, in one collective per dimension of a mesh and dtype.
    """
    grads = [p.grad for p in params] if grads is None else list(grads)
    late = [i for i, (p, g) in enumerate(zip(params, grads, strict=True)) if g is not None and differs(p, g)]
    if late:
        with torch.no_grad():
            for i, grad in zip(late, _without_partials([grads[i] for i in late]), strict=True):
                grads[i] = grad.redistribute(placements=params[i].placements)  # type: ignore[attr-defined]
    return [g if g is None or not is_dtensor(g) else ready(local(g)) for g in grads]


def differs(p: Tensor, grad: Tensor) -> bool:
    """Returns whether a gradient has other placements than its parameter."""
    return is_dtensor(grad) and is_dtensor(p) and grad.placements != p.placements  # type: ignore[attr-defined]


def _without_partials(grads: list[Any]) -> list[Any]:
    """Returns DTensors with their terms added up; many in one collective."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    batches: dict[Any, list[int]] = {}
    for i, grad in enumerate(grads):
        for d, placement in enumerate(grad.placements):
            if type(placement) is Partial and placement.reduce_op in ("sum", "avg"):
                batches.setdefault((grad.device_mesh, d, placement.reduce_op, grad.dtype), []).append(i)
    for (mesh, d, reduce_op, _), members in batches.items():
        parts = [ready(local(grads[i])) for i in members]
        packed = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(packed, group=mesh.get_group(d))
        if reduce_op == "avg":
            packed /= mesh.size(d)
        totals = torch.split(packed, [part.numel() for part in parts])
        for i, part, total in zip(members, parts, totals, strict=True):
            placements = list(grads[i].placements)
            placements[d] = Replicate()
            shape, stride = grads[i].shape, grads[i].stride()
            grads[i] = DTensor.from_local(
                total.view(part.shape), mesh, placements, run_check=False, shape=shape, stride=stride
            )
    return grads
