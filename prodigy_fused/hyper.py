"""Hyper-parameters: what each may be, which of them the groups must share, and their form for the backends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .low_precision import MODES

# How the step is computed, not what: these belong to the machine, so a checkpoint does not carry them over.
IMPLEMENTATION = ("foreach", "fused", "capturable", "backend")
FLAGS = ("decouple", "use_bias_correction", "safeguard_warmup", "fsdp_in_use", "maximize", "capturable")
LAYOUT = ("slice_p", "state_dtype", "low_precision", "fsdp_in_use", *IMPLEMENTATION)
SETTINGS = (
    "betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup", "d0", "d_coef",
    "growth_rate", "maximize", *LAYOUT,
)  # fmt: skip
STATE_DTYPES = (torch.float32, torch.bfloat16, None)


@dataclass(frozen=True)
class Shared:
    """What the groups must agree on as long as they share one ``d``."""

    d0: float
    d_coef: float
    growth_rate: float
    beta3: float


class Hyper(NamedTuple):
    """One group's hyper-parameters for one step, as plain numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decouple: bool
    use_bias_correction: bool
    safeguard_warmup: bool
    maximize: bool


def number(value: Any) -> float:
    """``value`` as a float; NaN for anything that is not one real number, so that every range check fails on it."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else math.nan
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _require(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise ValueError(f"Invalid {name}: {value!r}: must be {wanted}")


def check(group: dict[str, Any]) -> None:
    """Raises ``ValueError`` naming the first hyper-parameter of ``group`` that is out of range or reach, or NaN."""
    for name in SETTINGS:
        values = group[name] if isinstance(group[name], (tuple, list)) else [group[name]]
        _require(not any(map(on_device, values)), name, group[name], "a number: of tensors on a device, only lr may be")
    for name in ("lr", "weight_decay"):
        _require(0 <= number(group[name]) < math.inf, name, group[name], "a finite number >= 0")
    for name in ("eps", "d0", "d_coef"):
        _require(0 < number(group[name]) < math.inf, name, group[name], "a finite number > 0")
    betas = group["betas"]
    _require(isinstance(betas, (tuple, list)) and len(betas) == 2, "betas", betas, "a pair of numbers")
    for i, beta in enumerate(betas):
        _require(0 <= number(beta) < 1, f"betas[{i}]", beta, "in [0, 1)")
    if group["beta3"] is not None:
        _require(0 <= number(group["beta3"]) < 1, "beta3", group["beta3"], "in [0, 1), or None for sqrt(beta2)")
    _require(number(group["growth_rate"]) >= 1, "growth_rate", group["growth_rate"], ">= 1 (inf: unrestricted)")
    for name in FLAGS:
        _require(group[name] in (True, False), name, group[name], "True or False")
    for name in ("foreach", "fused"):
        _require(group[name] is None or isinstance(group[name], bool), name, group[name], "True, False or None")
    slice_p = group["slice_p"]
    _require(
        isinstance(slice_p, int) and not isinstance(slice_p, bool) and slice_p >= 1,
        "slice_p",
        slice_p,
        "an int >= 1",
    )
    dtype = group["state_dtype"]
    _require(dtype in STATE_DTYPES, "state_dtype", dtype, f"one of {STATE_DTYPES}")
    mode = group["low_precision"]
    _require(mode is None or mode in MODES, "low_precision", mode, f"one of {MODES}, or None for the dtype's own")
    fits = mode != "displacement" or slice_p == 1
    _require(fits, "low_precision", mode, "'stochastic' with slice_p > 1: a displacement needs all of x0")


def check_scalar(name: str, value: Any) -> None:
    """Raises ``ValueError`` if ``value``, a scaler's, is none: neither a number nor a tensor of one element."""
    one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (Real, NoneType))
    _require(one, name, value, "a number, or a tensor of one element")


def beta3_of(group: dict[str, Any]) -> float:
    """The decay of ``s`` and of the numerator: ``sqrt(beta2)`` unless given."""
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else float(group["beta3"])


def settings_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """Everything in a group that :func:`check` looks at but ``lr``, to notice a change between steps."""
    return tuple(map(_plain, map(group.__getitem__, SETTINGS)))


def _plain(value: Any) -> Any:
    """A copy, of what can be changed in place."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.tolist() if isinstance(value, Tensor) else value


def layout_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the shapes of the state and the choice of the backend."""
    return (group["betas"][0] > 0, *map(group.__getitem__, LAYOUT))


def on_device(value: Any) -> bool:
    """Whether the host would have to wait for ``value``."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def hyper_of(group: dict[str, Any], wait: bool = True) -> Hyper:
    """The group's numbers as they stand now (schedulers write into the group between steps).

    Without ``wait`` an ``lr`` on the device is left unread, and is NaN here.

    Raises:
        ValueError: ``lr`` is negative or not finite.
    """
    lr = math.nan
    if wait or not on_device(group["lr"]):
        lr = number(group["lr"])
        _require(0 <= lr < math.inf, "lr", group["lr"], "a finite number >= 0 (does a schedule run past its end?)")
    return Hyper(
        lr=lr,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decouple=bool(group["decouple"]),
        use_bias_correction=bool(group["use_bias_correction"]),
        safeguard_warmup=bool(group["safeguard_warmup"]),
        maximize=bool(group["maximize"]),
    )


def bias_correction(h: Hyper, k: Any) -> Any:
    """``bc``, Adam's, of step ``k`` (a number or a tensor, 0 for the first)."""
    if not h.use_bias_correction:
        return 1.0
    return (1 - h.beta2 ** (k + 1)) ** 0.5 / (1 - h.beta1 ** (k + 1))


def shared_of(groups: list[dict[str, Any]]) -> Shared:
    """The hyper-parameters of the one estimate.

    Raises:
        ValueError: two groups disagree on one of them; names the argument and both groups.
    """
    first = Shared(*_shared_values(groups[0]).values())
    for i, group in enumerate(groups):
        check_shared(first, i, group)
    return first


def check_shared(first: Shared, index: int, group: dict[str, Any]) -> None:
    """Raises ``ValueError`` if ``group``, the one of that index, disagrees with group 0."""
    for name, value in _shared_values(group).items():
        if value != getattr(first, name):
            defaulted = name == "beta3" and group["beta3"] is None
            advice = " (beta3 defaults to sqrt(beta2): give beta3 explicitly)" if defaulted else ""
            raise ValueError(
                f"parameter groups 0 and {index} disagree on {name} ({getattr(first, name)} and {value}), "
                f"but groups that share one estimate d must share it{advice}"
            )


def _shared_values(group: dict[str, Any]) -> dict[str, float]:
    return {
        "d0": float(group["d0"]),
        "d_coef": float(group["d_coef"]),
        "growth_rate": float(group["growth_rate"]),
        "beta3": beta3_of(group),
    }
