"""Everything that ranks exchange in a step: whether it is skipped, and the two sums of the estimate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .options import Group, Scalar


def is_sharded(groups: Iterable[Group], params: Iterable[Tensor]) -> bool:
    """Returns whether other ranks hold other elements of the parameters."""
    return any(group["fsdp_in_use"] for group in groups) or any(hasattr(p, "_fsdp_flattened") for p in params)


def agree(found_inf: Scalar, device: torch.device) -> Scalar:
    """Returns whether ``found_inf`` is not zero on any rank, as 0 or 1: all skip a step, or none. One collective.

    It must be set on all ranks or on none. Without this a rank that skips would never enter :func:`gather`, in which
    the others wait.
    """
    if not dist.is_initialized():
        return found_inf
    worst = (torch.as_tensor(found_inf) != 0).to(device, torch.float32)  # NaN, too
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst


def gather(sums: Tensor) -> Tensor:
    """Returns the sums over all ranks. One collective, in stream order: the host does not wait."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
