"""The optimizer state of one parameter: one table of its tensors, and how they are created and adapted.

============= ==================== ======== =====================================================================
key           shape                dtype    meaning (docs/algorithm.md, Algorithm 4)
============= ==================== ======== =====================================================================
exp_avg       the parameter's      state    ``m``; absent as long as beta1 is 0
exp_avg_sq    the parameter's      state    ``v``
s             sampled              state    ``s``; absent once ``prodigy_steps`` have been taken, and so is p0
p0            sampled, or 0-dim    param    ``x0``: an exact copy; a 0-dim zero stands for an all-zero parameter
delta         the parameter's      float32  ``x - x0``; only with ``low_precision="displacement"``
low           the parameter's      int8     8 more bits of ``x``; only with ``low_precision="24bit"``
scale         (blocks, 4)          uint8    only with ``state_dtype="8bit"``, see Note [8 bits] in eight_bits.py: the
                                            first three are then uint8, and an int8 ``delta`` takes the place of p0,
                                            unless there are samples: those stay float32 and a p0
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

from .coded_state import codes_of, in_codes, numbers_of, with_codes, with_numbers
from .dtensor import IndexMap, is_dtensor, samples_of, unwrap, wrap
from .eight_bits import CODES, blocks_of, is_coded, moves_in_codes
from .low_precision import mode_of
from .options import Group
from .tensors import check_memory, describe, is_dense, is_fake, same_layout, sampled

State = dict[str, Any]


def state_dtype(p: Tensor, group: Group) -> torch.dtype:
    """Returns the dtype of exp_avg, exp_avg_sq and s: the requested one, or the parameter's; float64 for float64; of
    those that are not in 8 bits, although others are, float32."""
    requested: str | None = group["state_dtype"]
    if requested is None or p.dtype == torch.float64:
        return p.dtype
    dtype: torch.dtype = getattr(torch, "float32" if requested == "8bit" else requested)
    return dtype


def state_format(p: Tensor, group: Group) -> str:
    """Returns "8bit", or the name of the dtype of exp_avg, exp_avg_sq and s."""
    return "8bit" if is_coded(p, group) else str(state_dtype(p, group)).removeprefix("torch.")


def _always(p: Tensor, group: Group) -> bool:
    return True


class Field(NamedTuple):
    """One tensor of the state."""

    key: str
    shape: Literal["full", "sampled", "blocks"]
    dtype: Callable[[Tensor, Group], torch.dtype]
    present: Callable[[Tensor, Group], bool]
    """Whether a parameter of this group has it."""
    created_late: Callable[[Tensor, Group], bool] = lambda p, group: False
    """Whether a state may lack it, because an option that needs it was switched on later: it is created as zeros."""
    in_reference: bool = True
    """Whether ``prodigyopt.Prodigy`` 1.1.2 has it, so that every checkpoint must, unless it may be created late."""

    def slice_p(self, group: Group) -> int:
        """Returns every which element the tensor has."""
        return int(group["slice_p"]) if self.shape == "sampled" else 1

    def size(self, p: Tensor, group: Group, where: IndexMap | None) -> torch.Size:
        """Returns the shape of the tensor."""
        if self.shape == "blocks":
            return torch.Size([blocks_of(p.numel()), len(CODES)])
        slice_p = self.slice_p(group)
        if slice_p == 1:
            return p.shape
        return torch.Size([-(-p.numel() // slice_p) if where is None else where.sample_count(slice_p)])

    def like(self, p: Tensor, group: Group, where: IndexMap | None) -> Tensor:
        """Returns the elements of ``p`` for which the tensor has one; or another tensor of its shape."""
        if self.shape == "blocks":
            return p.new_empty(self.size(p, group, where))
        return sampled(p, self.slice_p(group), where)


def _parameter_dtype(p: Tensor, group: Group) -> torch.dtype:
    return p.dtype


def _code_dtype(key: str) -> Callable[[Tensor, Group], torch.dtype]:
    return lambda p, group: CODES[key].storage if is_coded(p, group) else state_dtype(p, group)


def _s_dtype(p: Tensor, group: Group) -> torch.dtype:
    return CODES["s"].storage if is_coded(p, group) and group["slice_p"] == 1 else state_dtype(p, group)


def _delta_dtype(p: Tensor, group: Group) -> torch.dtype:
    return CODES["delta"].storage if is_coded(p, group) else torch.float32


def _is_estimated(p: Tensor, group: Group) -> bool:
    return not group.get("frozen", False)


def _is_displaced(p: Tensor, group: Group) -> bool:
    return mode_of(p, group) == "displacement"


def _is_extended(p: Tensor, group: Group) -> bool:
    return mode_of(p, group) == "24bit"


def _has_p0(p: Tensor, group: Group) -> bool:
    return _is_displaced(p, group) or (_is_estimated(p, group) and not moves_in_codes(p, group))


def _has_delta(p: Tensor, group: Group) -> bool:
    return _is_displaced(p, group) or moves_in_codes(p, group)


# csrc/python/state.h has the same keys in the same order, which is checked when a compiled backend is imported.
FIELDS = (
    Field("exp_avg", "full", _code_dtype("exp_avg"), lambda p, group: group["betas"][0] > 0, created_late=_always),
    Field("exp_avg_sq", "full", _code_dtype("exp_avg_sq"), _always),
    Field("s", "sampled", _s_dtype, _is_estimated),
    Field("p0", "sampled", _parameter_dtype, _has_p0),
    # A step makes a displacement of zeros fit x and x0.
    Field("delta", "full", _delta_dtype, _has_delta, created_late=_is_displaced, in_reference=False),
    # Zeros: x itself is kept.
    Field("low", "full", lambda p, group: torch.int8, _is_extended, created_late=_always, in_reference=False),
    Field("scale", "blocks", lambda p, group: torch.uint8, is_coded, in_reference=False),
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
    coded = is_coded(p, group)
    if not in_codes(state):
        if not coded:
            return _fitting(index, p, state, group, where)
        numbers = _fitting(index, p, state, with_numbers(p, group), where)
        return codes_of(p, numbers, group, state.get("delta"), state.get("scale"))
    codes = _fitting(index, p, state, with_codes(group), where)
    # Of a flat s the order of memory is not known, but that of the others is.
    known = [(t, state[key]) for key, t in codes.items() if key in state and t.shape == state[key].shape == p.shape]
    if coded and all(same_layout(t, before) for t, before in known):
        if group["frozen"]:  # of s and delta, which are given back, no trace is left
            codes["scale"] = codes["scale"].clone()
            codes["scale"][:, CODES["s"].column :] = 0
        return codes
    # In another memory order, blocks have other elements.
    numbers = numbers_of(p, {key: value.to(p.device) for key, value in state.items() if key in codes}, group)
    return adapted(index, p, numbers, group, where)


def _fitting(index: int, p: Tensor, state: State, group: Group, where: IndexMap | None) -> State:
    """Returns the tensors of the fields that the group's state has, as :func:`adapted` does."""
    new: State = {}
    # A momentum that was switched off is kept for when it is switched on again, as the reference keeps it.
    fields = [f for f in FIELDS if f.present(p, group) or (f.key == "exp_avg" and f.key in state)]
    for field in fields:
        value: Any = state.get(field.key)
        if value is None and field.key == "p0" and group["frozen"]:
            value = p.detach().clone()  # the start was given back, but a displacement may count from anywhere
        elif value is None and field.created_late(p, group):
            value = _zeros(field.like(p, group, where), field.dtype(p, group))
        size, dtype = field.size(p, group, where), field.dtype(p, group)
        what = f"the state {field.key!r} of {describe(index, p)}"
        new[field.key] = _like(_checked(what, value, field, size, dtype), p, dtype)
    if "scale" in new and not is_fake(p) and new["scale"].data_ptr() % len(CODES):
        new["scale"] = new["scale"].clone()  # kernels move a block's bytes at once
    return new


def _checked(what: str, value: Any, field: Field, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns a tensor of a state in the shape that it is to have; samples may be flat, as in a checkpoint.

    Raises:
        ValueError: it is none, or does not fit; ``what`` names it.
    """
    if isinstance(value, Tensor) and field.shape == "sampled" and value.shape == (size.numel(),) != size:
        value = value.reshape(size)
    if not isinstance(value, Tensor) or not (value.shape == size or (field.key == "p0" and value.dim() == 0)):
        got = tuple(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(f"{what} should have shape {tuple(size)}, got {got}")
    if value.layout != torch.strided:
        raise ValueError(f"{what} is sparse ({value.layout})")
    check_memory(what, value)
    if field.key in CODES and value.is_floating_point() != dtype.is_floating_point:
        raise ValueError(f"{what} is {value.dtype}: all have to be codes, with their scale, or all numbers")
    return value


def replace(own: State, new: State) -> None:
    """Puts an adapted state into the entry of its parameter, in which others may keep something, too."""
    for key in KEYS:
        if key not in new:
            own.pop(key, None)  # an option has changed, or the samples are given back
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
    new = {key: value for key, value in state.items() if key not in KEYS}
    for field in FIELDS:  # in this order on all ranks, as saving takes a collective for each
        value = state.get(field.key)
        if isinstance(value, Tensor) and not is_dtensor(value):
            slice_p = field.slice_p(group)
            value = wrap(value, p, None if slice_p == 1 else samples_of(where, slice_p, value.device))
        if field.key in state:
            new[field.key] = value
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
    value = value.clone() if value.is_inference() else value
    if value.shape != p.shape or not is_dense(p):
        return value.contiguous() if value.shape != p.shape else value
    return value if same_layout(value, p) else torch.empty_like(p, dtype=dtype).copy_(value)
