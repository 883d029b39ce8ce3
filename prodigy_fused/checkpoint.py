"""State dictionaries in the reference's format, so that checkpoints of prodigyopt and of this package are
interchangeable.

In memory, ``s`` and ``p0`` have the parameter's shape when slice_p is 1; in a checkpoint they are flat, in row-major
order. The reference also keeps an int ``step`` per parameter, which nothing reads: it is written as ``k``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import estimate, hyper, options, state
from .coded_state import as_on_all_ranks, in_codes, numbers_of, with_codes, with_numbers
from .dtensor import index_map, is_dtensor, local
from .estimate import COUNTERS, FIELDS, check_value
from .low_precision import check_mode, mode_of
from .options import OPTIONS, Group
from .tensors import describe

StateDict = dict[str, Any]
# What prodigyopt 1.1.2 writes for every group; anything less is another optimizer's dictionary, or an older one's.
REFERENCE_KEYS = (*options.IN_REFERENCE, *estimate.IN_REFERENCE)
FLAT = tuple(field.key for field in state.FIELDS if field.shape == "sampled")


@dataclass
class Verbatim:
    """A parameter's state, wrapped so that ``Optimizer.load_state_dict``, which casts tensors, dictionaries and
    sequences to the parameter's dtype, does not touch it."""

    state: dict[str, Any]


def check_owners(optimizer: Optimizer) -> None:
    """Raises ``KeyError``, as torch does with an address for a message, if a state's parameter is in no group."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in optimizer.state:
        if isinstance(p, Tensor) and id(p) not in owned:
            raise KeyError(
                f"optimizer.state has an entry for a parameter of shape {tuple(p.shape)} that is in no group (any "
                "more), so that no checkpoint can hold it: delete the entry, or add the parameter again"
            )


def export(optimizer: Optimizer, state_dict: StateDict, compact: bool = False) -> StateDict:
    """Returns ``Optimizer.state_dict()`` in the reference's format: flat ``s`` and ``p0``, numbers in the groups.

    The state of DTensors is in DTensors, all of the parameter's shape. State in 8 bits is in float32, unless
    ``compact`` and no DTensors'; beside the reference's tensors there are the scale, and ``x - x0`` as it is kept.
    """
    groups = []
    for group in state_dict["param_groups"]:
        numbers = {name: (int if name in COUNTERS else float)(group[name]) for name in FIELDS}
        groups.append({**group, **numbers})
    states = dict(state_dict["state"])  # also entries that belong to no parameter
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        for p, i in zip(own["params"], group["params"], strict=True):
            if not state.is_there(states.get(i)):
                continue
            if in_codes(states[i]) and (is_dtensor(p) or not compact):
                states[i] = numbers_of(local(p), states[i], group)
            states[i] = _with_momentum(states[i], group)
            if is_dtensor(p):
                states[i] = as_on_all_ranks(local(p), states[i], group)
                states[i] = {"step": group["k"], **state.wrapped(p, states[i], group, index_map(p))}
            else:
                states[i] = _flat(states[i], group["k"])
    return {**state_dict, "state": states, "param_groups": groups}


def _with_momentum(saved: dict[str, Any], group: Group) -> dict[str, Any]:
    """Returns one parameter's state with the ``exp_avg`` that its group now wants, which the next step would create."""
    v = saved.get("exp_avg_sq")
    if group["betas"][0] == 0 or "exp_avg" in saved or not isinstance(v, Tensor):
        return saved
    return {"exp_avg": torch.zeros_like(v), **saved}  # as codes, too, these are zeros


def _flat(saved: dict[str, Any], k: int) -> dict[str, Any]:
    """Returns one parameter's state with flat samples; the 0-dim ``p0`` of an all-zero parameter stays 0-dim,
    and codes, whose scale goes by their order in memory, keep their shape."""
    samples = {key: saved[key] for key in FLAT if key in saved and saved[key].is_floating_point()}
    flat = {key: v if key == "p0" and v.dim() == 0 else v.flatten() for key, v in samples.items()}
    return {"step": k, **saved, **flat}


def import_(groups: list[Group], state_dict: StateDict) -> StateDict:
    """Checks a state dictionary against the optimizer's ``groups``; returns the form that
    ``Optimizer.load_state_dict`` can load. Changes neither. The counterpart of :func:`export`.

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
    imported = [
        _import_group(i, group, saved) for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True))
    ]
    hyper.estimate_options_of(imported)  # raises where groups disagree

    states = dict(state_dict["state"])
    index = 0  # among all parameters
    for group, new in zip(groups, imported, strict=True):
        saved = {i: states[i] for i in new["params"] if isinstance(states.get(i), dict)}
        keys: set[Any] = set().union(*saved.values())
        for p, i in zip(group["params"], new["params"], strict=True):
            if i in saved:
                states[i] = Verbatim(_import_state(index, p, saved[i], new, keys))
            index += 1
    return {**state_dict, "state": states, "param_groups": imported}


def _import_group(index: int, group: Group, saved: Group) -> Group:
    where = f"param_groups[{index}] of the state dict"
    if "d_numerator" in saved:
        saved = {"slice_p": 1, **saved}  # which version 1.0 of the reference does not have
    missing = [key for key in REFERENCE_KEYS if key not in saved]
    if missing:
        raise ValueError(f"{where} lacks {missing}: not a checkpoint of Prodigy 1.1.2")
    if saved["slice_p"] != group["slice_p"]:
        raise ValueError(
            f"param_groups[{index}] was saved with slice_p={saved['slice_p']}, this optimizer has "
            f"slice_p={group['slice_p']}: construct it with slice_p={saved['slice_p']} to continue that run"
        )
    imported = {**estimate.initial(saved["d"]), "frozen": False, **saved}
    for name in OPTIONS:
        # An option that the reference lacks may be missing from the checkpoint, and stays as constructed.
        if name in options.IMPLEMENTATION or name not in saved:
            imported[name] = group[name]
    options.check(imported)
    imported.update(options.stored(imported))
    for name in FIELDS:
        try:
            value = check_value(name, imported[name])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        imported[name] = int(value) if name in COUNTERS else value
    return imported


def _import_state(
    index: int, p: Tensor, saved: dict[str, Any], group: dict[str, Any], keys: set[Any]
) -> dict[str, Any]:
    """Returns the in-memory form of one parameter's saved entry, on its device and in its memory order; a new
    dictionary.

    Args:
        keys: those of all parameters of its group. What is created late may be missing from all of them, not from one.
    """
    if not state.is_there(saved):
        return _for_others(p, saved)
    if is_lazy(p):
        raise ValueError(f"parameter {index} has no shape yet: run the model once before load_state_dict")
    if p.is_meta:
        raise ValueError(f"{describe(index, p)} is on the meta device: materialise the model before load_state_dict")
    check_mode(p, group)
    coded = in_codes(saved)
    as_saved = with_codes(group) if coded else with_numbers(p, group)
    fields = [field for field in state.fields_of(p, as_saved) if field.in_reference]
    if group["frozen"]:
        fields = [f for f in fields if f.key != "p0"]  # has been given back, unless x was rounded to a displacement
    required = [f.key for f in fields if f.key in keys or not f.created_late(p, as_saved)]
    missing = [key for key in required if key not in saved]
    if missing:
        raise ValueError(f"the saved state of {describe(index, p)} lacks {missing}")
    tensors = {key: value for key, value in saved.items() if key in state.KEYS}
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in tensors.items()}
    others = _for_others(p, {key: value for key, value in saved.items() if key not in state.KEYS})
    where = index_map(p)
    unwrapped = state.unwrapped(p, copies, group, where)
    own = state.adapted(index, local(p), unwrapped, group, where)
    if in_codes(own) != coded:
        # Whoever loads x after this has its start changed into codes, or back, where the next step looks at it.
        own = {key: value.to(p.device) for key, value in unwrapped.items() if isinstance(value, Tensor)}
        if mode_of(p, group) != "24bit":
            own.pop("low", None)  # of a parameter that has 16 bits no more
    if "p0" in own and "p0" not in unwrapped:  # a displacement from where x will be: whoever loads it may do so later
        del own["p0"], own["delta"]
    if "p0" in own and own["p0"].dim() == 0 and p.dim() > 0 and own["p0"]:
        raise ValueError(f"the saved p0 of {describe(index, p)} is one number, {own['p0']:g}, and not zero")
    return {**others, "step": int(saved.get("step", group["k"])), **own}


def _for_others(p: Tensor, entries: dict[str, Any]) -> dict[str, Any]:
    """Returns what others keep in a parameter's entry: copies on its device, in the dtypes that were saved."""
    return {key: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for key, v in entries.items()}
