"""Parameters and state of 16 bits: what they are rounded to, and with which random bits.

All arithmetic is float32; every value is rounded once, where it is stored. How ``x`` is, the option ``low_precision``
decides:

- *stochastic*: up or down, with probabilities that make the rounding exact on average. A bfloat16 ``x`` cannot hold a
  step of 1e-6 of itself; it takes one whole unit in one step of some thousand instead.
- *displacement*: to nearest, of ``x0 + delta``, where ``delta = x - x0`` is one more state, in float32. The step is
  taken by ``delta``, so nothing is lost, and ``<g, x0 - x>`` is ``-<g, delta>``. Where ``x`` is not ``x0 + delta``
  rounded, somebody else has written it, and ``delta`` follows.
- *nearest*: to nearest, as the reference has it.

Of the state, ``exp_avg_sq`` is rounded stochastically in 16 bits (to nearest, an average of small terms stops short),
``exp_avg`` and ``s`` to nearest.

In a backend of one pass, the step of ``update`` is made of the ``m`` and ``v`` that it has just computed, what
``finish`` does, of the stored ones. What ``finish`` adds to an ``x`` that is rounded already is rounded by itself: it
is a small part of a step and, rounded stochastically, still exact on average. (A displacement stays float32.)

Note [Random bits]
Stochastic rounding draws 32 bits per element from a counter, so that there is no generator's state and every backend
has the same bits. The counter is ``(step, tensor, stream, element)``: ``k`` of the estimate before the step; the
parameter's index in the optimizer; 0 for a step and 1 for what ``finish`` adds to an ``x`` that is rounded already;
the element's position in memory (in row-major order, if there are gaps). With 32-bit integers that wrap around::

    mix(h)  = h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16
    word    = 2 * (element >> 32) + stream
    a       = mix(mix(mix(SEED + step) + tensor) + word)
    b       = mix(mix(mix(~SEED + tensor) + word) + step)
    bits    = h = element ^ a;  h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h += b;  h *= 0x846ca68b;  h ^= h >> 16

``x`` is rounded with these; ``exp_avg_sq`` with the same, its halves exchanged, in stream 0. The rounding takes as many
of the bits as it needs from the top.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tensors import HALVES, describe, is_dense, sampled

if TYPE_CHECKING:
    from .step import Slot

MODES = ("stochastic", "displacement", "nearest")
SEED = 0x9E3779B9
PATIENCE = 10  # steps after which rounding to nearest is looked at
_WORD = 0xFFFFFFFF


def mode_of(p: Tensor, group: dict[str, Any]) -> str | None:
    """How ``x`` is rounded; None for float32 and float64 parameters, which are not."""
    if p.dtype not in HALVES:
        return None
    if group["low_precision"] is not None:
        return str(group["low_precision"])
    # A displacement needs all of x0, which slice_p is there to save.
    return "displacement" if p.dtype == torch.float16 and group["slice_p"] == 1 else "stochastic"


def arithmetic(p: Tensor) -> torch.dtype:
    """The dtype that a step of ``p`` is computed in."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _mix(h: Any) -> Any:
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD
    h = (h ^ h >> 15) * 0x846CA68B & _WORD
    return h ^ h >> 16


def random_bits(p: Tensor, step: Any, tensor: int, stream: int = 0) -> Tensor:
    """The random bits of every element of ``p``, see Note [Random bits].

    Args:
        p: gives shape, strides and device.
        step: ``k``, a number or a 0-dim tensor.
        tensor: the parameter's index.
        stream: 0 for a step, 1 for a correction.

    Returns:
        int64, 0 to 2**32 - 1, of the shape of ``p``.
    """
    element = torch.arange(p.numel(), device=p.device)
    element = element.as_strided(p.shape, p.stride()) if is_dense(p) and p.numel() else element.view(p.shape)
    word = 2 * (element >> 32) + stream if p.numel() > 1 << 32 else stream
    step = step.to(torch.int64) & _WORD if isinstance(step, Tensor) else int(step) & _WORD
    a = _mix(_mix(_mix(SEED + step & _WORD) + tensor & _WORD) + word & _WORD)
    b = _mix(_mix(_mix((~SEED & _WORD) + tensor & _WORD) + word & _WORD) + step & _WORD)
    h = (element ^ a) & _WORD
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD
    h = ((h ^ h >> 15) + b) * 0x846CA68B & _WORD
    bits: Tensor = h ^ h >> 16
    return bits


def exchanged(bits: Tensor) -> Tensor:
    """Random bits with their halves exchanged."""
    return bits << 16 & _WORD | bits >> 16


def stochastic(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """``value`` (float32) in ``dtype`` (bfloat16 or float16), rounded up in size with a probability that is the part
    of a unit it is above the next smaller number; values that ``dtype`` has, infinities and NaN stay.

    Args:
        bits: int64, from :func:`random_bits`.
    """
    size = value.abs()
    words = size.view(torch.int32).to(torch.int64)
    dropped = 16 if dtype == torch.bfloat16 else 13
    rounded = _floats((words + (bits >> 32 - dropped)) >> dropped << dropped)
    if dtype == torch.float16:
        # Subnormal: in units of 2^-24, which are the same for all.
        units = size * 2.0**24
        whole = units.floor()
        up = (bits >> 8).to(torch.float32) * 2.0**-24 < units - whole
        rounded = torch.where(size < 2.0**-14, (whole + up) * 2.0**-24, rounded)
    return torch.where(value.isfinite(), rounded.copysign(value), value).to(dtype)


def _floats(words: Tensor) -> Tensor:
    return words.to(torch.int32).view(torch.float32)


# -- one parameter, for the backends in Python -------------------------------------------------------------------------


def position(slot: Slot) -> Tensor:
    """``x`` in the precision of the arithmetic: the parameter itself where that is its own, else a new tensor."""
    p = slot.param.detach()
    if slot.low_precision != "displacement":
        return p.to(arithmetic(p))
    x0: Tensor = slot.state["p0"].float()
    delta: Tensor = slot.state["delta"]
    delta.copy_(torch.where((x0 + delta).to(p.dtype) == p, delta, p.float() - x0))
    return x0 + delta


def move(slot: Slot, by: Tensor, k: Any) -> None:
    """``x -= by``, in step ``k`` (a number or a tensor); ``by`` is in the precision of the arithmetic."""
    p = slot.param
    if slot.low_precision == "displacement":
        delta = slot.state["delta"]
        delta.sub_(by)
        p.copy_(slot.state["p0"].float() + delta)
    elif slot.low_precision == "stochastic":
        p.copy_(stochastic(p.float() - by, p.dtype, random_bits(p, k, slot.index)))
    else:
        p.copy_(p.to(by.dtype) - by)


def keep(slot: Slot, key: str, value: Tensor, k: Any) -> None:
    """Stores a state tensor, ``value`` being in the precision of the arithmetic."""
    stored = slot.state[key]
    if stored is value:
        return
    if key == "exp_avg_sq" and stored.dtype in HALVES:
        value = stochastic(value, stored.dtype, exchanged(random_bits(slot.param, k, slot.index)))
    stored.copy_(value)


def warn_if_stuck(slots: Iterable[Slot]) -> None:
    """Warns of parameters that rounding to nearest has kept at their start, although they had gradients.

    Waits for the device, once.
    """
    watched = [slot for slot in slots if slot.low_precision == "nearest" and slot.param.numel() > 0]
    flags = [
        (sampled(slot.param.detach(), slot.slice_p) == slot.state["p0"]).all() & slot.state["exp_avg_sq"].any()
        for slot in watched
    ]
    stuck = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    where = [describe(slot.index, slot.param) for slot, flag in zip(watched, stuck, strict=True) if flag]
    if where:
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        warnings.warn(
            f"{where[0]}{more}: no element that the estimate looks at has moved in {PATIENCE} steps, although the "
            'gradients are not zero: low_precision="nearest" rounds each step away. Use "stochastic" or "displacement"',
            stacklevel=2,
        )
