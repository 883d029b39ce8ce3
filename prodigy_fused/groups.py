"""Checks of a group that joins an optimizer: its parameters, and its choice of a backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from . import backends, state
from .dtensor import index_map, local
from .options import Group
from .plans import parameters
from .tensors import check_parameter, describe, is_passenger


def check_new(groups: list[Group], group: Group) -> None:
    """Raises if a parameter of ``group``, an addition to ``groups``, cannot be optimized.

    Raises:
        TypeError, ValueError, RuntimeError: names the parameter's index and shape, and the reason.
    """
    known = {id(p): i for i, p in enumerate(parameters(groups))}
    first = sum(len(other["params"]) for other in groups)
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    kinds: set[Any] = set()
    for index, p in enumerate(params, start=first):
        p = p[1] if isinstance(p, tuple) else p
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {index} is a {type(p).__name__}: Prodigy optimizes tensors")
        if known.get(id(p), first) < first:  # twice in one group: torch warns, and it is stepped once
            raise ValueError(f"{describe(index, p)} is a duplicate of parameter {known[id(p)]}")
        known[id(p)] = index
        if is_lazy(p) or p.is_meta or is_passenger(p):
            continue  # has no shape, or no memory, yet, or needs none; checked when its first gradient arrives
        check_parameter(index, p)
        if not (p.is_leaf or p.retains_grad):
            raise ValueError(f"{describe(index, p)} is not a leaf: optimize the tensor it was computed from")
        # All contiguous tensors of a kind have the same backend: a model of 100,000 is asked for a few of them.
        mine = local(p)
        kind = type(p), mine.device, p.dtype, p.dim()
        if kind not in kinds or not mine.is_contiguous():
            backends.choose(mine, group, index_map(p))
            kinds.add(kind)


def with_its_own_choice(group: Group) -> Group:
    """Returns a group in which the default of one way to choose a backend does not contradict the group's own."""
    ways = ("foreach", "fused", "backend")
    chosen = any(group.get(way) is not None for way in ways)
    return {**dict.fromkeys(ways), **group} if chosen else dict(group)


def check_all_are_stepped(before: list[Tensor], groups: list[Group], states: dict[Tensor, Any]) -> None:
    """Raises if the parameters of the last step are all gone, while their state is kept: DeepSpeed's ZeRO calls
    ``step()`` for a part of the parameters at a time, which is right for no optimizer with a number common to all.

    Raises:
        RuntimeError: names the remedy.
    """
    now = set(map(id, parameters(groups)))
    stepped = [p for p in before if state.is_there(states.get(p))]
    if now and stepped and not any(id(p) in now for p in stepped):
        raise RuntimeError(
            "this step is given other parameters than the last one, whose state is kept: Prodigy estimates d from all "
            "parameters, and cannot be stepped for a part of them at a time. With DeepSpeed's ZeRO, use one parameter "
            "group, and in stage 3 a sub_group_size that is at least the number of parameters; if the others were "
            "replaced for good, remove them from optimizer.state"
        )
