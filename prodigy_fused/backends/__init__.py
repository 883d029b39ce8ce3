"""The backends, best first, and the choice among them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from ..step import Plan, Slot

COMPILED = ("cuda", "triton", "cpu")
NAMES = (*COMPILED, "foreach", "reference")


def in_one_pass(name: str) -> bool:
    """Whether backend ``name`` steps all elements at once, so that no two may be the same memory."""
    return name not in ("foreach", "reference")


def load(name: str) -> ModuleType:
    """The backend module: ``unsupported(p, group) -> str | None`` and ``make_plan(slots) -> Plan``."""
    return importlib.import_module(f".{name}", __name__)


def check_choice(group: dict[str, Any]) -> None:
    """Raises if the options ``backend``, ``fused`` and ``foreach`` of a group contradict each other.

    Raises:
        ValueError: an unknown backend, or one that ``fused`` or ``foreach`` excludes.
    """
    backend, fused, foreach = group["backend"], group["fused"], group["foreach"]
    if backend is not None and backend not in NAMES:
        raise ValueError(f"Invalid backend: {backend!r}: must be one of {NAMES} or None")
    if fused and foreach:
        raise ValueError("fused=True and foreach=True exclude each other")
    if backend is not None and fused is not None and bool(fused) != (backend in COMPILED):
        raise ValueError(f"backend={backend!r} and fused={fused} contradict each other")
    if backend is not None and foreach is not None and foreach != (backend == "foreach"):
        raise ValueError(f"backend={backend!r} and foreach={foreach} contradict each other")


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def choose(p: Tensor, group: dict[str, Any]) -> str:
    """The backend for one parameter.

    ``backend=...`` and ``fused=True`` never fall back; ``fused=None`` takes the first backend that can.

    Raises:
        RuntimeError: the one asked for cannot take this parameter; says why, and the remedy.
    """
    named = [group["backend"]] if group["backend"] is not None else None
    if named is None and group["fused"] is not True:
        if group["foreach"] is False:
            return "reference"
        if group["fused"] is False or group["foreach"]:
            return "foreach"
    reasons = {name: load(name).unsupported(p, group) for name in named or COMPILED}
    for name, reason in reasons.items():
        if reason is None:
            return name
    if named is None and group["fused"] is None:
        fit = load("compiled").unfit(p, group) is None  # else nothing that could be installed would help
        if fit and (missing := load("cpu" if p.device.type == "cpu" else "triton").missing(p.device)):
            _say_once(f"prodigy_fused runs on its slower foreach backend: {missing}")
        return "foreach"
    asked = "fused=True" if named is None else f"backend={named[0]!r}"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{asked} cannot be used for a parameter of shape {tuple(p.shape)}: {why}")


def make_plan(name: str, slots: Sequence[Slot]) -> Plan:
    """A plan of backend ``name`` for the tensors of one bucket."""
    plan: Plan = load(name).make_plan(slots)
    return plan
