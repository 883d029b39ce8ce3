"""A parameter's state in its two forms: codes, as steps of ``state_dtype="8bit"`` keep it, and numbers, as checkpoints
have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .eight_bits import CODES, blocks_of, decode, encode
from .low_precision import float32_weights, mode_of
from .options import Group
from .tensors import memory_order

State = dict[str, Any]


def in_codes(state: State) -> bool:
    """Returns whether a state's tensors are codes."""
    v = state.get("exp_avg_sq")
    return "scale" in state and isinstance(v, Tensor) and v.dtype == CODES["exp_avg_sq"].storage


def with_codes(group: Group) -> Group:
    """Returns a group whose parameters all have their state in codes."""
    mode = group["low_precision"]
    own = None if mode == "displacement" else mode
    return {**group, "state_dtype": "8bit", "min_8bit_size": 0, "low_precision": own}


def with_numbers(p: Tensor, group: Group) -> Group:
    """Returns a group in which ``p`` has as numbers what codes stand for, and is rounded as in ``group``."""
    return {**group, "state_dtype": "float32", "low_precision": mode_of(p, group)}


def load(key: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the numbers of codes, float32 of their shape and memory order; those of "exp_avg_sq" are ``v``.

    Args:
        key: of the state.
        codes: dense, in any memory order.
        scale: uint8[blocks, 4].
    """
    code, order = CODES[key], memory_order(codes)
    numbers = decode(code, codes.permute(order).reshape(-1), scale[:, code.column])
    numbers = numbers.mul_(numbers) if key == "exp_avg_sq" else numbers
    return numbers.as_strided(codes.shape, codes.stride()) if codes.numel() else numbers.view(codes.shape)


def store(
    key: str, codes: Tensor, scale: Tensor, value: Tensor, bits: Tensor | None = None, former: Tensor | None = None
) -> None:
    """Writes numbers as codes and their column of scale. The inverse of :func:`load`.

    Args:
        value: float32, in any memory order.
        bits: int32, random; None: rounds to nearest.
        former: uint8[blocks, 4], a scale with which the numbers may be those of codes.
    """
    code, order = CODES[key], memory_order(codes)
    value = value.sqrt() if key == "exp_avg_sq" else value
    flat = value.permute(order).reshape(-1)
    draws = None if bits is None else bits.permute(order).reshape(-1)
    given = None if former is None else former[:, code.column]
    new, column = encode(code, flat, draws, given)
    codes.permute(order).view(-1).copy_(new)
    scale[:, code.column] = column


def numbers_of(p: Tensor, state: State, group: Group) -> State:
    """Returns a state in codes as numbers: float32, with a p0; the scale, and delta, are still there, for
    :func:`codes_of`.

    Args:
        p: of a DTensor, this rank's tensor.
    """
    scale = state["scale"]
    coded = [key for key in CODES if key in state and state[key].dtype == CODES[key].storage]
    new = {**state, **{key: load(key, state[key], scale) for key in coded}}
    if "delta" in coded:
        new["p0"] = float32_weights(p, state, with_codes(group)) - new["delta"]
    return new


def as_on_all_ranks(p: Tensor, numbers: State, group: Group) -> State:
    """Returns a shard's state in numbers with the tensors that each rank has, whether or not its elements are enough
    for codes: saving them takes collectives. The scale is of this rank's blocks."""
    new = {key: value for key, value in numbers.items() if key != "scale"}
    if group["state_dtype"] == "8bit" and group["slice_p"] == 1 and "p0" in new and p.dtype != torch.float64:
        new.setdefault("delta", _moved(float32_weights(p, new, group), new["p0"], None))
    return new


def codes_of(p: Tensor, numbers: State, group: Group, delta: Tensor | None, former: Tensor | None) -> State:
    """Returns the codes of a state in numbers, rounded to nearest.

    Args:
        p: of a DTensor, this rank's tensor.
        numbers: of the fields that the state has; tensors of the parameter's shape have its memory order.
        delta: ``x - x0`` more exactly than p0 says it, unless they contradict each other.
        former: the scale that there was when they were codes.
    """
    sampled = group["slice_p"] > 1
    new = {key: value for key, value in numbers.items() if sampled or key != "p0"}
    scale = torch.zeros(blocks_of(p.numel()), len(CODES), dtype=torch.uint8, device=p.device)
    former = former.to(scale) if former is not None and former.shape == scale.shape else None
    values = {key: new[key] for key in CODES if key in new and new[key].shape == p.shape}
    if sampled:
        values.pop("s", None)
    elif "p0" in numbers:
        values["delta"] = _moved(float32_weights(p, numbers, group), numbers["p0"], delta)
    for key, value in values.items():
        new[key] = torch.empty_like(value, dtype=CODES[key].storage)
        store(key, new[key], scale, value.float(), former=former)
    return {**new, "scale": scale}


def _moved(x: Tensor, x0: Tensor, delta: Tensor | None) -> Tensor:
    """Returns ``x - x0``: where they fit, as exactly as ``delta`` has it."""
    difference = (x - x0).nan_to_num_(0.0, 0.0, 0.0)  # a mask is infinite, and does not move
    if delta is None or delta.shape != x.shape:
        return difference
    delta = delta.to(x)
    return torch.where((x - delta).to(x0.dtype) == x0, delta, difference)
