"""Stochastic rounding to 16 bits, and the counter-based random bits behind it.

Note [Random bits]
Stochastic rounding draws 32 bits per element from a counter, so that there is no generator's state and every backend
has the same bits. The counter is ``(step, tensor, stream, element)``: ``k`` of the estimate before the step; the
parameter's index in the optimizer; 0 for a step and 1 for what ``finish`` adds to an ``x`` that is rounded already;
the element's position in memory (in row-major order, if there are gaps). ``mix`` is the hash "lowbias32" (C. Wellons,
"Prospecting for Hash Functions", 2018). With 32-bit integers that wrap around::

    mix(h)  = h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16
    word    = 2 * (element >> 32) + stream
    a       = mix(mix(mix(SEED + step) + tensor) + word)
    b       = mix(mix(mix(~SEED + tensor) + word) + step)
    bits    = h = element ^ a;  h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h += b;  h *= 0x846ca68b;  h ^= h >> 16

``x`` is rounded with these; ``exp_avg_sq`` with the same, its halves exchanged, in stream 0. The rounding takes as many
of the bits as it needs from the top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tensors import is_dense

SEED = 0x9E3779B9
_WORD = 0xFFFFFFFF


def _mix(h: Any) -> Any:
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD
    h = (h ^ h >> 15) * 0x846CA68B & _WORD
    return h ^ h >> 16


def random_bits(p: Tensor, step: Any, tensor: int, stream: int = 0) -> Tensor:
    """Returns the random bits of every element of ``p``, see Note [Random bits].

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
    """Returns the random bits of a second value of the same elements: the halves exchanged."""
    return bits << 16 & _WORD | bits >> 16


def stochastic(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Returns ``value`` (float32) rounded to ``dtype`` (bfloat16 or float16): away from zero with probability equal to
    the fractional part (in units of the last place), else towards zero. Values that ``dtype`` can represent, infinities
    and NaN stay.

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
