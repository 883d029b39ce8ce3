"""Stochastic rounding to 16 bits, and the counter-based random bits behind it.

Note [Random bits]
Stochastic rounding draws 32 bits per element from a counter, so that there is no generator's state and every backend
has the same bits. The counter is ``(step, tensor, stream, element)``: ``k`` of the estimate before the step; the
parameter's index in the optimizer; 0 for a step and 1 for what ``finish`` adds to an ``x`` that is rounded already;
the element's position in memory (in row-major order, if there are gaps; of a shard, its row-major index in the whole
tensor, see Note [Global index] in dtensor.py). Eight elements share a hash, ``mix`` is
"lowbias32" (C. Wellons, "Prospecting for Hash Functions", 2018), and take the next eight numbers of a multiplicative
generator from it (its factor is from G. Steele and S. Vigna, "Computationally easy, spectrally good multipliers for
congruential pseudorandom number generators", 2021). With 32-bit integers that wrap around::

    mix(h)  = h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16
    eight   = element >> 3
    word    = 2 * (eight >> 32) + stream
    a       = mix(mix(mix(SEED + step) + tensor) + word)
    b       = mix(mix(mix(~SEED + tensor) + word) + step)
    h       = eight ^ a;  h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h += b;  h *= 0x846ca68b;  h ^= h >> 16
    bits    = h * 0xadb4a92d ** (1 + element % 8)

``x`` is rounded with these; in stream 0, ``exp_avg_sq`` with ``second(bits)`` and ``s`` with ``third(bits)``, the
number eight places further on. The rounding takes as many of the bits as it needs from the top: the lowest ones are
alike in all eight, as in every such generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dtensor import IndexMap
from .tensors import is_dense

SEED = 0x9E3779B9
FACTOR = 0xADB4A92D
_WORD = 0xFFFFFFFF


def _mix(h: Any) -> Any:
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD
    h = (h ^ h >> 15) * 0x846CA68B & _WORD
    return h ^ h >> 16


def random_bits(p: Tensor, step: Any, tensor: int, stream: int = 0, where: IndexMap | None = None) -> Tensor:
    """Returns the random bits of every element of ``p``, see Note [Random bits].

    Args:
        p: gives shape, strides and device.
        step: ``k``, a number or a 0-dim tensor.
        tensor: the parameter's index.
        stream: 0 for a step, 1 for a correction.
        where: the index map, if ``p`` is a shard.

    Returns:
        int64, 0 to 2**32 - 1, of the shape of ``p``.
    """
    g = None if where is None else where.indices(p.device)
    eight = torch.arange(-(-p.numel() // 8), device=p.device) if g is None else g >> 3
    word = 2 * (eight >> 32) + stream if (p.numel() if where is None else where.whole) > 1 << 35 else stream
    step = step.to(torch.int64) & _WORD if isinstance(step, Tensor) else int(step) & _WORD
    a = _mix(_mix(_mix(SEED + step & _WORD) + tensor & _WORD) + word & _WORD)
    b = _mix(_mix(_mix((~SEED & _WORD) + tensor & _WORD) + word & _WORD) + step & _WORD)
    h = (eight ^ a) & _WORD
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD
    h = ((h ^ h >> 15) + b) * 0x846CA68B & _WORD
    powers = torch.tensor([pow(FACTOR, 1 + i, 1 << 32) for i in range(8)], device=p.device)
    if g is not None:
        bits: Tensor = (h ^ h >> 16) * powers[g & 7] & _WORD
        return bits
    bits = ((h ^ h >> 16)[:, None] * powers & _WORD).flatten()[: p.numel()]
    return bits.as_strided(p.shape, p.stride()) if is_dense(p) and p.numel() else bits.view(p.shape)


def second(bits: Tensor) -> Tensor:
    """Returns random bits for a second value (``exp_avg_sq``) of the elements: the halves, the lower one improved by
    the upper one, exchanged."""
    mixed = bits ^ bits >> 16
    return mixed << 16 & _WORD | mixed >> 16


def third(bits: Tensor) -> Tensor:
    """Returns random bits for a third value (``s``) of the elements."""
    return bits * pow(FACTOR, 8, 1 << 32) & _WORD


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
