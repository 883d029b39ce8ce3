"""The option ``low_precision``: how 16-bit parameters are kept, and a warning where they cannot move.

All arithmetic is float32; every value is rounded once, when it is stored. The modes for ``x``:

- *stochastic*: up or down, with probabilities that make the rounding exact on average. A bfloat16 ``x`` cannot hold a
  step of 1e-6 of itself; it takes one whole unit in one step of some thousand instead.
- *24bit*: the next 8 bits of the mantissa of a bfloat16 ``x`` are one more state, a byte, and what both keep is rounded
  stochastically: see Note [24 bits] in rounding.py. The step is taken by the kept value; the model sees ``x``.
- *displacement*: to nearest, of ``x0 + delta``, where ``delta = x - x0`` is one more state, in float32. The step is
  taken by ``delta``, so nothing is lost, and ``<g, x0 - x>`` is ``-<g, delta>``. If x no longer equals
  ``round(x0 + delta)``, other code has written to the parameter, and ``delta`` is reset to ``x - x0``.
- *nearest*: to nearest, as the reference has it.

Of 16-bit state, ``exp_avg_sq`` and ``s`` are rounded stochastically (to nearest, an average of small terms stops short,
and a decay of less than half a unit a step is lost), ``exp_avg`` to nearest.

In a backend of one pass, ``update`` computes the step from m and v before they are rounded, and ``finish`` from the
stored ones. What ``finish`` adds to an ``x``, of 16 or 24 bits, that is rounded already is rounded by itself: it is a
small part of a step and, rounded stochastically, still exact on average. (A displacement stays float32.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .options import SIXTEEN_BIT, Group
from .rounding import kept_value
from .step import Slot
from .tensors import describe

STUCK_AFTER_STEPS = 10  # steps after which rounding to nearest is looked at


def mode_of(p: Tensor, group: Group) -> str | None:
    """Returns how ``x`` is rounded; None for float32 and float64 parameters, which are not."""
    if p.dtype not in SIXTEEN_BIT:
        return None
    if group["low_precision"] is not None:
        return str(group["low_precision"])
    if p.dtype == torch.bfloat16:
        return "24bit"
    # A displacement needs all of x0 and 4 bytes, which slice_p and state in 8 bits are there to save.
    return "displacement" if group["slice_p"] == 1 and group["state_dtype"] != "8bit" else "stochastic"


def check_mode(p: Tensor, group: Group) -> None:
    """Checks that parameters of this dtype can be kept as the group wants.

    Raises:
        ValueError: they cannot; says what can.
    """
    if p.dtype == torch.float16 and group["low_precision"] == "24bit":
        raise ValueError(
            f'Invalid low_precision: "24bit" for a float16 parameter of shape {tuple(p.shape)}: a byte extends '
            'bfloat16 only; use "displacement" or "stochastic", or another group for bfloat16'
        )


def check_not_cast(index: int, p: Tensor, state: dict[str, Any]) -> None:
    """Checks that what a state keeps beside a 16-bit ``x`` still belongs to it.

    Raises:
        ValueError: the parameter was cast; names it.
    """
    start = state.get("p0")  # beside a delta of numbers that codes stood for, it is float32
    displaced = "delta" in state and isinstance(start, Tensor) and start.dtype in SIXTEEN_BIT
    if ("low" in state or displaced) and p.dtype not in SIXTEEN_BIT:
        raise ValueError(
            f"{describe(index, p)} was cast to {p.dtype}, which has lost what was kept beside its 16 bits: read the "
            "weights before the cast (the next step goes on from the parameter as it is)"
        )


def float32_weights(p: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    """Returns what is kept of a parameter's ``x``, a new tensor: float32, or float64 of float64.

    Args:
        p: of a DTensor, this rank's tensor, as in ``state``.
    """
    x, mode = p.detach(), mode_of(p, group)
    if mode == "24bit" and "low" in state:
        return kept_value(x, state["low"])
    if mode == "displacement" and "delta" in state:
        master: Tensor = state["p0"].float() + state["delta"]
        return torch.where(master.to(x.dtype) == x, master, x.float())
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)


def warn_if_stuck(slots: Iterable[Slot]) -> None:
    """Warns of parameters that rounding to nearest has kept at their start, although they had gradients.

    Waits for the device, once.
    """
    nearest = [slot for slot in slots if slot.low_precision == "nearest" and not slot.frozen]
    watched = [slot for slot in nearest if slot.param.numel() > 0 and _start(slot).numel() > 0]
    flags = [_is_at_start(slot) & slot.state["exp_avg_sq"].any() for slot in watched]
    stuck = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    where = [describe(slot.index, slot.param) for slot, flag in zip(watched, stuck, strict=True) if flag]
    if where:
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        warnings.warn(
            f"{where[0]}{more}: no element that the estimate looks at has moved in {STUCK_AFTER_STEPS} steps, although "
            'the gradients are not zero: low_precision="nearest" rounds each step away. Use "24bit", "stochastic" or '
            '"displacement"',
            stacklevel=2,
        )


def _start(slot: Slot) -> Tensor:
    start: Tensor = slot.state["delta" if slot.moves_in_codes else "p0"]
    return start


def _is_at_start(slot: Slot) -> Tensor:
    start = _start(slot)
    return ~start.any() if slot.moves_in_codes else (slot.sampled(slot.param.detach()) == start).all()
