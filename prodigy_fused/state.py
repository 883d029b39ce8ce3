"""The optimizer state of one parameter: one table of its tensors, and how they are created and adapted.

============= ==================== ======== =====================================================================
key           shape                dtype    meaning (docs/algorithm.md, Algorithm 4)
============= ==================== ======== =====================================================================
exp_avg       the parameter's      state    ``m``; absent while beta1 is 0
exp_avg_sq    the parameter's      state    ``v``
s             sampled              state    ``s``; absent once ``prodigy_steps`` have been taken, and so is p0
p0            sampled, or 0-dim    param    ``x0``: an exact copy; a 0-dim zero stands for an all-zero parameter
delta         the parameter's      float32  ``x - x0``; only with ``low_precision="displacement"``
low           the parameter's      int8     8 more bits of ``x``; only with ``low_precision="24bit"``
============= ==================== ======== =====================================================================

*sampled* is the parameter's own shape when ``slice_p`` is 1, else ``(ceil(numel / slice_p),)``: the elements
0, p, 2p, ... of the parameter flattened in row-major order, whatever its strides. Tensors of the parameter's shape
have its strides too, so that one index addresses them all. ``s`` and ``p0`` may also be given flat, in row-major
order, as checkpoints have them. Beside these tensors there is ``step``, an int: the steps in which the parameter had a
gradient and its group a learning rate. All other entries are somebody else's, and stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .dtensor import IndexMap, is_dtensor, samples_of, unwrap, wrap
from .low_precision import mode_of
from .options import Group
from .tensors import check_memory, describe, is_dense, is_fake, same_layout, sampled

State = dict[str, Any]


def state_dtype(p: Tensor, group: Group) -> torch.dtype:
    """Returns the dtype of exp_avg, exp_avg_sq and s: the requested one, or the parameter's; float64 for float64."""
    requested: str | None = group["state_dtype"]
    if requested is None or p.dtype == torch.float64:
        return p.dtype
    dtype: torch.dtype = getattr(torch, requested)
    return dtype


class Field(NamedTuple):
    """One tensor of the state."""

    key: str
    shape: Literal["full", "sampled"]
    dtype: Callable[[Tensor, Group], torch.dtype]
    present: Callable[[Tensor, Group], bool]
    """Whether a parameter of this group has it."""
    created_late: bool = False
    """Whether a state may lack it, because an option that needs it was switched on later: it is created as zeros."""
    in_reference: bool = True
    """Whether ``prodigyopt.Prodigy`` 1.1.2 has it, so that every checkpoint must; others are created late."""

    def slice_p(self, group: Group) -> int:
        """Returns every which element the tensor has."""
        return 1 if self.shape == "full" else int(group["slice_p"])

    def size(self, p: Tensor, group: Group, where: IndexMap | None) -> torch.Size:
        """Returns the shape of the tensor."""
        slice_p = self.slice_p(group)
        if slice_p == 1:
            return p.shape
        return torch.Size([-(-p.numel() // slice_p) if where is None else where.sample_count(slice_p)])

    def like(self, p: Tensor, group: Group, where: IndexMap | None) -> Tensor:
        """Returns the elements of ``p`` for which the tensor has one."""
        return sampled(p, self.slice_p(group), where)


def _parameter_dtype(p: Tensor, group: Group) -> torch.dtype:
    return p.dtype


def _float32(p: Tensor, group: Group) -> torch.dtype:
    return torch.float32


def _int8(p: Tensor, group: Group) -> torch.dtype:
    return torch.int8


def _always(p: Tensor, group: Group) -> bool:
    return True


def _is_estimated(p: Tensor, group: Group) -> bool:
    return not group.get("frozen", False)


def _is_displaced(p: Tensor, group: Group) -> bool:
    return mode_of(p, group) == "displacement"


# csrc/python/state.h has the same keys in the same order, which is checked when a compiled backend is imported.
FIELDS = (
    Field("exp_avg", "full", state_dtype, lambda p, group: group["betas"][0] > 0, created_late=True),
    Field("exp_avg_sq", "full", state_dtype, _always),
    Field("s", "sampled", state_dtype, _is_estimated),
    Field("p0", "sampled", _parameter_dtype, lambda p, group: _is_estimated(p, group) or _is_displaced(p, group)),
    # A step makes a delta of zeros fit x and x0.
    Field("delta", "full", _float32, _is_displaced, created_late=True, in_reference=False),
    # Zeros: x itself is kept.
    Field("low", "full", _int8, lambda p, group: mode_of(p, group) == "24bit", created_late=True, in_reference=False),
)
KEYS = tuple(field.key for field in FIELDS)


def fields_of(p: Tensor, group: Group) -> list[Field]:
    """Returns the fields that the state of ``p`` has."""
    return [field for field in FIELDS if field.present(p, group)]


def is_there(state: State | None) -> bool:
    """Returns whether an entry of the optimizer's ``state`` holds a state, and not only what others keep there."""
    return bool(state) and any(key in state for key in KEYS)  # type: ignore[operator]


def create(p: Tensor, group: Group, is_part: bool, where: IndexMap | None = None) -> State:
    """Returns the state of a parameter that has not been stepped yet. Waits for one flag (is x0 all zero?), unless it
    is a part of one: the shape of the state must not depend on one rank's elements.

    Args:
        p: this rank's tensor.
        where: the index map of a shard.
    """
    all_zero = not is_part and not is_fake(p) and not p.any()
    x = p.detach()
    state: State = {"step": 0}
    for field in fields_of(p, group):
        like = field.like(x, group, where)
        if field.key != "p0":
            state[field.key] = _zeros(like, field.dtype(p, group))
        else:
            state["p0"] = x.new_zeros(()) if all_zero else like.clone()
    return state


def adapted(index: int, p: Tensor, state: State, group: Group, where: IndexMap | None = None) -> State:
    """Returns a state moved and cast to the device, dtype and memory format that its parameter has now.

    Args:
        p: this rank's tensor.
        where: the index map of a shard.

    Returns:
        A new dictionary; tensors that need no change are shared.

    Raises:
        ValueError: a state tensor is missing, sparse, without memory or of another shape; names the parameter's index
            and shape.
    """
    new: State = {}
    for field in fields_of(p, group):
        value: Any = state.get(field.key)
        if value is None and field.created_late:
            value = _zeros(field.like(p, group, where), field.dtype(p, group))
        what = f"the state {field.key!r} of {describe(index, p)}"
        size = field.size(p, group, where)
        if isinstance(value, Tensor) and field.shape == "sampled" and value.shape == (size.numel(),) and p.dim() != 1:
            value = value.reshape(size)  # flat, as in a checkpoint
        fits = isinstance(value, Tensor) and (value.shape == size or (field.key == "p0" and value.dim() == 0))
        if not fits:
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"{what} should have shape {tuple(size)}, got {got}")
        if value.layout != torch.strided:
            raise ValueError(f"{what} is sparse ({value.layout})")
        check_memory(what, value)
        new[field.key] = _like(value, p, field.dtype(p, group))
    return new


def replace(own: State, new: State, group: Group) -> None:
    """Puts an adapted state into the entry of its parameter, in which others may keep something, too."""
    for field in FIELDS:
        if field.key not in new and (group["frozen"] or not field.in_reference):
            own.pop(field.key, None)  # an option has changed, or the samples are given back
    own.setdefault("step", 0)
    own.update(new)


def remove(states: dict[Tensor, State], p: Tensor) -> None:
    """Removes the state of a parameter; what others keep in its entry stays."""
    for key in ("step", *KEYS):
        states[p].pop(key, None)
    if not states[p]:
        del states[p]


def wrapped(p: Tensor, state: State, group: Group, where: IndexMap | None) -> State:
    """Returns the state of a DTensor with its tensors as DTensors, which torch.distributed.checkpoint can move to other
    meshes. Samples are wrapped as tensors of the parameter's shape."""
    new = dict(state)
    for field in FIELDS:
        value = state.get(field.key)
        if isinstance(value, Tensor) and not is_dtensor(value):
            slice_p = field.slice_p(group)
            new[field.key] = wrap(value, p, None if slice_p == 1 else samples_of(where, slice_p, value.device))
    return new


def unwrapped(p: Tensor, state: State, group: Group, where: IndexMap | None) -> State:
    """Returns this rank's part of a parameter's state, of which a checkpoint has all, perhaps as DTensors, and samples
    perhaps in tensors of the parameter's shape; what is no tensor of the state is shared."""
    new = dict(state)
    for field in FIELDS:
        value = state.get(field.key)
        if isinstance(value, Tensor):
            new[field.key] = unwrap(value, p, where, field.slice_p(group))
    return new


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)


def _like(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``value`` on the device of ``p``, in ``dtype``, and in the memory order of ``p`` if it has its shape."""
    value = value.detach().to(device=p.device, dtype=dtype)
    if value.shape != p.shape or not is_dense(p):
        return value.contiguous() if value.shape != p.shape else value
    return value if same_layout(value, p) else torch.empty_like(p, dtype=dtype).copy_(value)
