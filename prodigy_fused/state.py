"""The optimizer state of one parameter, created at its first gradient and kept in step with the parameter.

============= ==================== ======== =====================================================================
key           shape                dtype    meaning (ALGORITHM.md, Algorithm 4)
============= ==================== ======== =====================================================================
exp_avg       the parameter's      state    ``m``; absent while beta1 is 0
exp_avg_sq    the parameter's      state    ``v``
s             sampled              state    ``s``
p0            sampled, or 0-dim    param    ``x0``: an exact copy; a 0-dim zero stands for an all-zero parameter
delta         the parameter's      float32  ``x - x0``; only with ``low_precision="displacement"``
============= ==================== ======== =====================================================================

*sampled* is the parameter's own shape when ``slice_p`` is 1, else ``(ceil(numel / slice_p),)``: the elements
0, p, 2p, ... of the parameter flattened in row-major order, whatever its strides. Tensors of the parameter's shape
have its strides too, so that one index walks them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .low_precision import mode_of
from .tensors import check_memory, describe, is_dense, same_layout, sampled

State = dict[str, Any]
# May be missing where an option has changed; zero then. (A step makes delta fit x and x0.)
LATE = ("exp_avg", "delta")


def state_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of exp_avg, exp_avg_sq and s: the asked one, or the parameter's; float64 for float64 parameters."""
    asked: torch.dtype | None = group["state_dtype"]
    return p.dtype if asked is None or p.dtype == torch.float64 else asked


def _zeros(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def create(p: Tensor, group: dict[str, Any], sharded: bool) -> State:
    """The state of a parameter that has not been stepped yet. Reads one flag back to the host (is x0 all zero?)."""
    dtype = state_dtype(p, group)
    x = sampled(p.detach(), group["slice_p"])
    # Under sharding the shape of the state must not depend on what one rank's shard happens to hold.
    all_zero = not sharded and not p.any()
    state = {
        "s": _zeros(x, dtype),
        "p0": torch.zeros((), dtype=p.dtype, device=p.device) if all_zero else x.clone(),
        "exp_avg_sq": _zeros(p, dtype),
    }
    if group["betas"][0] > 0:
        state["exp_avg"] = _zeros(p, dtype)
    if mode_of(p, group) == "displacement":
        state["delta"] = _zeros(p, torch.float32)
    return state


def follow(index: int, p: Tensor, state: State, group: dict[str, Any]) -> State:
    """An existing state as its parameter needs it now, on its device, in its dtype and memory format; a new dictionary.

    Raises:
        ValueError: a state tensor is missing, sparse, without memory or of another shape; names the parameter's index
            and shape.
    """
    followed: State = {}
    dtypes = {"p0": p.dtype, "delta": torch.float32}
    for key, shape in shapes(p, group).items():
        value: Any = state.get(key)
        if value is None and key in LATE:
            value = _zeros(p, state_dtype(p, group))
        fits = isinstance(value, Tensor) and (value.shape == shape or (key == "p0" and value.dim() == 0))
        if not fits:
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"the state {key!r} of {describe(index, p)} should have shape {tuple(shape)}, got {got}")
        if value.layout != torch.strided:
            raise ValueError(f"the state {key!r} of {describe(index, p)} is sparse ({value.layout})")
        check_memory(f"the state {key!r} of {describe(index, p)}", value)
        followed[key] = _like(value, p, dtypes.get(key, state_dtype(p, group)))
    return followed


def shapes(p: Tensor, group: dict[str, Any]) -> dict[str, torch.Size]:
    """The shapes of the state tensors of ``p``, by key."""
    slice_p = group["slice_p"]
    sample = p.shape if slice_p == 1 else torch.Size([-(-p.numel() // slice_p)])
    expected = {"s": sample, "p0": sample, "exp_avg_sq": p.shape}
    if group["betas"][0] > 0:
        expected["exp_avg"] = p.shape
    if mode_of(p, group) == "displacement":
        expected["delta"] = p.shape
    return expected


def _like(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` on the device of ``p``, in ``dtype``, and in the memory order of ``p`` where it has its shape."""
    value = value.detach().to(device=p.device, dtype=dtype)
    if value.shape != p.shape or not is_dense(p):
        return value.contiguous() if value.shape != p.shape else value
    return value if same_layout(value, p) else torch.empty_like(p, dtype=dtype).copy_(value)
