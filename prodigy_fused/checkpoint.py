"""State dictionaries in the reference's format, so that checkpoints of prodigyopt and of this package interchange.

In memory, ``s`` and ``p0`` have the parameter's shape when slice_p is 1; in a checkpoint they are flat, in row-major
order. The reference also keeps an int ``step`` per parameter, which nothing reads: it is written as ``k``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from . import hyper, state
from .estimate import COUNTERS, FIELDS, check_value
from .tensors import describe

StateDict = dict[str, Any]
# What prodigyopt 1.1.2 writes for every group; anything less is another optimizer's dictionary, or an older one's.
REFERENCE_KEYS = (
    "lr", "betas", "beta3", "eps", "weight_decay", "d", "d0", "d_max", "d_numerator", "d_coef", "k", "growth_rate",
    "use_bias_correction", "decouple", "safeguard_warmup", "fsdp_in_use", "slice_p",
)  # fmt: skip


@dataclass
class Verbatim:
    """A parameter's state, wrapped so that ``Optimizer.load_state_dict``, which casts tensors, dictionaries and
    sequences to the parameter's dtype, passes it on as it is."""

    state: dict[str, Any]


def export(state_dict: StateDict) -> StateDict:
    """``Optimizer.state_dict()`` in the reference's format: flat ``s`` and ``p0``, plain numbers in the groups."""
    groups = []
    for group in state_dict["param_groups"]:
        numbers = {name: (int if name in COUNTERS else float)(group[name]) for name in FIELDS}
        groups.append({**group, **numbers})
    states = {}
    for group in groups:
        for i in group["params"]:
            if i in state_dict["state"]:
                states[i] = _flat(state_dict["state"][i], group["k"])
    return {**state_dict, "state": states, "param_groups": groups}


def _flat(saved: dict[str, Any], k: int) -> dict[str, Any]:
    flat = {key: v.flatten() if key == "s" or (key == "p0" and v.dim() > 0) else v for key, v in saved.items()}
    return {"step": k, **flat}


def admit(groups: list[dict[str, Any]], state_dict: StateDict) -> StateDict:
    """Checks a state dictionary against the optimizer's ``groups`` and makes it ready for
    ``Optimizer.load_state_dict``; changes neither.

    Raises:
        ValueError: wrong group or parameter counts, missing keys (named), another slice_p, a number out of range or
            NaN, a state tensor of the wrong shape (parameter index and shape named).
    """
    for part in ("state", "param_groups"):
        if part not in state_dict:
            raise ValueError(f"the state dict has no {part!r}: it is not an optimizer's")
    saved_groups = state_dict["param_groups"]
    counts = [[len(g["params"]) for g in gs] for gs in (groups, saved_groups)]
    if counts[0] != counts[1]:
        raise ValueError(f"the optimizer's groups have {counts[0]} parameters, the state dict's {counts[1]}")
    admitted = [
        _admit_group(i, group, saved) for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True))
    ]
    hyper.shared_of(admitted)

    states = dict(state_dict["state"])
    numbered = enumerate(
        (p, i, new)
        for group, new in zip(groups, admitted, strict=True)
        for p, i in zip(group["params"], new["params"], strict=True)
    )
    for index, (p, i, group) in numbered:
        if states.get(i):
            states[i] = Verbatim(_admit_state(index, p, states[i], group))
    return {**state_dict, "state": states, "param_groups": admitted}


def _admit_group(index: int, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    missing = [key for key in REFERENCE_KEYS if key not in saved]
    if missing:
        raise ValueError(f"param_groups[{index}] of the state dict lacks {missing}: not a checkpoint of Prodigy 1.1.2")
    if saved["slice_p"] != group["slice_p"]:
        raise ValueError(
            f"param_groups[{index}] was saved with slice_p={saved['slice_p']}, this optimizer has "
            f"slice_p={group['slice_p']}: construct it with slice_p={saved['slice_p']} to continue that run"
        )
    own = {key: group[key] for key in hyper.IMPLEMENTATION}
    start = {"d_hat": saved["d"], "d_denom": 0.0, "nonfinite_steps": 0, "corrections": 0}
    rest = {key: group[key] for key in ("maximize", "state_dtype", "low_precision")}
    admitted = {**rest, **start, **saved, **own}
    hyper.check(admitted)
    for name in FIELDS:
        try:
            value = check_value(name, admitted[name])
        except ValueError as error:
            raise ValueError(f"param_groups[{index}] of the state dict: {error}") from None
        admitted[name] = int(value) if name in COUNTERS else value
    return admitted


def _admit_state(index: int, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """The in-memory form of one parameter's saved state, on its device and in its memory order; a new dictionary."""
    if is_lazy(p):
        raise ValueError(f"parameter {index} has no shape yet: run the model once before load_state_dict")
    shapes = state.shapes(p, group)
    missing = [key for key in shapes if key not in saved and key != "delta"]
    if missing:
        raise ValueError(f"the saved state of {describe(index, p)} lacks {missing}")
    restored = {key: saved[key] for key in shapes if key in saved}
    for key in ("s", "p0"):
        flat = restored[key]
        if isinstance(flat, Tensor) and flat.dim() > 0 and flat.numel() == shapes[key].numel():
            restored[key] = flat.reshape(shapes[key])
    copies = {key: v.clone() if isinstance(v, Tensor) else v for key, v in restored.items()}
    own = state.follow(index, p, copies, group)
    if own["p0"].dim() == 0 and p.dim() > 0 and own["p0"]:
        raise ValueError(f"the saved p0 of {describe(index, p)} is one number, {own['p0']:g}, and not zero")
    return {**{key: v for key, v in saved.items() if key not in own and key not in ("step", "delta")}, **own}
