"""The options of the optimizer: one table, and everything that is derived from it.

A new option is a row of ``OPTIONS``, a line in the signature and the docstring of :class:`prodigy_fused.Prodigy`, and
the place that uses it. ``param_groups`` hold options as plain words and numbers, so that they survive ``json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from operator import is_
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Group: TypeAlias = dict[str, Any]
Scalar: TypeAlias = float | Tensor
"""A number that the host knows, or a tensor of one element on a device, for whose value the host does not wait."""

STATE_DTYPES = ("float32", "bfloat16", "8bit")
LOW_PRECISION = ("stochastic", "24bit", "displacement", "nearest")
LR_ROUNDING = 1e-9  # of a group's initial lr
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def on_device(value: Any) -> bool:
    """Returns whether reading ``value`` would synchronise the host with a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def number(value: Any) -> float:
    """Returns ``value`` as a float; NaN, which fails every range check, for anything but one real number."""
    if type(value) in (float, int):  # which is quicker than to ask what an unknown number is
        return float(value)
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else math.nan
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


# -- how options are stored --------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Returns a number as Python's own int or float, which NumPy's and tensors are not."""
    return value if type(value) in (int, float) else number(value)


def _plain_lr(value: Any) -> Any:
    return value if isinstance(value, Tensor) else _plain(value)


def _plain_betas(value: Any) -> Any:
    plain = list(map(_plain, value))
    if isinstance(value, (tuple, list)) and all(map(is_, plain, value)):
        return value  # the caller's own list, through which the caller may change it
    return plain if isinstance(value, list) else tuple(plain)


def _plain_or_none(value: Any) -> Any:
    return None if value is None else _plain(value)


def _bool_or_none(value: Any) -> Any:
    return None if value is None else bool(value)


def _word(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _same(value: Any) -> Any:
    return value


# -- what is valid -----------------------------------------------------------------------------------------------------


def _is_fraction(value: Any) -> bool:
    return 0 <= number(value) < 1


def _is_pair(value: Any) -> bool:
    # OmegaConf's lists, which Hydra passes on, are other sequences; and arrays are none.
    return (isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1) and len(value) == 2


def _is_positive(value: Any) -> bool:
    return 0 < number(value) < math.inf


def _is_not_negative(value: Any) -> bool:
    return 0 <= number(value) < math.inf


def _is_finite(value: Any) -> bool:
    return -math.inf < number(value) < math.inf


def _is_flag(value: Any) -> bool:
    return (value is not None and _is_choice(value)) or number(value) in (0.0, 1.0)


def _is_choice(value: Any) -> bool:
    return value is None or isinstance(value, bool) or type(value).__name__ == "bool"  # NumPy's, too


def _is_int_from(least: int, end: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < end


def _or_none(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _is_one_of(words: Iterable[str]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, (str, torch.dtype)) and _word(value) in words)


class Option(NamedTuple):
    """One row of the table."""

    default: Any
    wanted: str
    """Completes "must be ..." in the error message."""
    valid: Callable[[Any], bool]
    role: Literal["rule", "estimate", "layout", "machine"]
    """rule: a number of each group's update. estimate: a number of d's update, common to all groups. layout: decides
    the shapes and formats of the state, and so the plans. machine: how a step is computed, not what it computes; so
    it decides the plans too, but checkpoints leave it as constructed."""
    in_reference: bool = True
    """Whether ``prodigyopt.Prodigy`` 1.1.2 has the option, so that its checkpoints do."""
    stored: Callable[[Any], Any] = _plain
    """Returns a valid value as it is kept in ``param_groups``."""


_FLAG: dict[str, Any] = {"wanted": "True or False", "valid": _is_flag, "stored": bool}
_CHOICE: dict[str, Any] = {"wanted": "True, False or None", "valid": _is_choice, "stored": _bool_or_none}
_POSITIVE: dict[str, Any] = {"wanted": "a finite number > 0", "valid": _is_positive}

OPTIONS: dict[str, Option] = {
    "lr": Option(
        1.0,
        wanted="a finite number >= 0 (does a schedule run past its end?)",
        valid=_is_finite,  # and not negative, which depends on the group, see check_lr
        role="rule",
        stored=_plain_lr,
    ),
    "betas": Option(
        (0.9, 0.999), wanted="a pair of numbers in [0, 1)", valid=_is_pair, role="rule", stored=_plain_betas
    ),
    "beta3": Option(
        None,
        wanted="in [0, 1), or None for sqrt(beta2)",
        valid=_or_none(_is_fraction),
        role="estimate",
        stored=_plain_or_none,
    ),
    "eps": Option(1e-8, role="rule", **_POSITIVE),
    "weight_decay": Option(0, wanted="a finite number >= 0", valid=_is_not_negative, role="rule"),
    "decouple": Option(True, role="rule", **_FLAG),
    "use_bias_correction": Option(False, role="rule", **_FLAG),
    "safeguard_warmup": Option(False, role="rule", **_FLAG),
    "d0": Option(1e-6, role="estimate", **_POSITIVE),
    "d_coef": Option(1.0, role="estimate", **_POSITIVE),
    "growth_rate": Option(
        math.inf, wanted=">= 1 (inf: unbounded)", valid=lambda value: number(value) >= 1, role="estimate"
    ),
    "fsdp_in_use": Option(False, role="layout", **_FLAG),
    "slice_p": Option(1, wanted="an int >= 1 and below 2**62", valid=_is_int_from(1, 2**62), role="layout", stored=int),
    "foreach": Option(None, role="machine", in_reference=False, **_CHOICE),
    "fused": Option(None, role="machine", in_reference=False, **_CHOICE),
    "maximize": Option(False, role="rule", in_reference=False, **_FLAG),
    "d_limit": Option(
        math.inf,
        wanted="a number > 0 (inf: unbounded)",
        valid=lambda value: number(value) > 0,
        role="estimate",
        in_reference=False,
    ),
    "split_groups": Option(False, role="layout", in_reference=False, **_FLAG),
    "prodigy_steps": Option(
        0, wanted="an int >= 0", valid=_is_int_from(0), role="layout", in_reference=False, stored=int
    ),
    "capturable": Option(False, role="machine", in_reference=False, **_FLAG),
    "state_dtype": Option(
        "float32",
        wanted=f"one of {STATE_DTYPES}, or None for the parameter's",
        valid=_is_one_of(STATE_DTYPES),
        role="layout",
        in_reference=False,
        stored=_word,
    ),
    "min_8bit_size": Option(
        4096, wanted="an int >= 1", valid=_is_int_from(1), role="layout", in_reference=False, stored=int
    ),
    "low_precision": Option(
        None,
        wanted=f"one of {LOW_PRECISION}, or None for the dtype's own",
        valid=_is_one_of(LOW_PRECISION),
        role="layout",
        in_reference=False,
        stored=_same,
    ),
    "backend": Option(
        None,
        wanted="the name of a backend, or None",
        valid=lambda value: True,  # backends.check_choice knows the names
        role="machine",
        in_reference=False,
        stored=_same,
    ),
}

# Stays with the optimizer that is there when a checkpoint is loaded.
IMPLEMENTATION = tuple(name for name, option in OPTIONS.items() if option.role == "machine")
LAYOUT = tuple(name for name, option in OPTIONS.items() if option.role in ("layout", "machine"))
# Compared at every step, while lr is read at every step. (Betas are compared one by one.)
SETTINGS = tuple(name for name in OPTIONS if name not in ("lr", "betas"))
IN_REFERENCE = tuple(name for name, option in OPTIONS.items() if option.in_reference)


def defaults() -> Group:
    """Returns the options of a group for which nothing was given."""
    return {name: option.default for name, option in OPTIONS.items()}


# -- checks ------------------------------------------------------------------------------------------------------------


def _require(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise ValueError(f"Invalid {name}: {value!r}: must be {wanted}")


def check(group: Group, names: Iterable[str] = OPTIONS) -> None:
    """Checks some options of a group, all unless said otherwise; and that they go together.

    Raises:
        ValueError: an option is out of range, NaN, or a tensor on a device (only ``lr`` may be one); names it.
    """
    for name in names:
        option, value = OPTIONS[name], group[name]
        if name != "lr":
            values = value if isinstance(value, (tuple, list)) else [value]
            wanted = "a Python number (only lr may be a tensor on a GPU)"
            _require(not any(map(on_device, values)), name, value, wanted)
        _require(option.valid(value), name, value, option.wanted)
    for i, beta in enumerate(group["betas"]):
        _require(_is_fraction(beta), f"betas[{i}]", beta, "in [0, 1)")
    if not on_device(group["lr"]):
        check_lr(group)
    wanted = "at least d0, which is where d starts"
    _require(number(group["d_limit"]) >= number(group["d0"]), "d_limit", group["d_limit"], wanted)
    wanted = "at least 2**-126 / eps: d * eps, which steps are divided by, would be no normal number of float32"
    _require(number(group["d0"]) * number(group["eps"]) >= 2.0**-126, "d0", group["d0"], wanted)
    mode = group["low_precision"]
    coded = group["state_dtype"] == "8bit"
    wanted = "'24bit' or 'stochastic' with state_dtype='8bit': a displacement keeps x - x0 in float32"
    _require(mode != "displacement" or not coded, "low_precision", mode, wanted)
    fits = mode != "displacement" or group["slice_p"] == 1
    _require(fits, "low_precision", mode, "'24bit' or 'stochastic' with slice_p > 1: a displacement needs all of x0")


def stored(group: Group, names: Iterable[str] = OPTIONS) -> Group:
    """Returns the valid options of a group, all unless said otherwise, as plain words and numbers; without those that
    it lacks."""
    return {name: OPTIONS[name].stored(group[name]) for name in names if name in group}


def check_scalar(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is None, a number, or a tensor of one element."""
    fits = value.numel() == 1 if isinstance(value, Tensor) else value is None or isinstance(value, Real)
    _require(fits, name, value, "a number, or a tensor of one element")


def check_lr(group: Group) -> float:
    """Returns the learning rate of a group as a number, which waits for one on a device.

    A negative one within rounding of 0, as torch's LinearLR leaves at its end, counts as 0.

    Raises:
        ValueError: it is negative or not finite.
    """
    lr = number(group["lr"])
    rounding = LR_ROUNDING * abs(number(group.get("initial_lr", 1.0)))
    _require(-rounding <= lr < math.inf, "lr", group["lr"], OPTIONS["lr"].wanted)
    return max(lr, 0.0)
