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
number eight places further on; a ``delta`` of 8 bits with ``fourth(bits)``, which is ``second(third(bits))``. The
rounding takes as many of the bits as it needs from the top (one that needs 15 for a code, those below the uppermost):
the lowest ones are alike in all eight, as in every such generator.

Note [24 bits]
A kept value has the sign and the exponent of a float32 and the upper 15 bits of its mantissa, and lies in memory as a
bfloat16 ``x``, which is the kept value rounded to nearest (ties away from zero), and a signed byte ``low``: the
difference in units of the kept value's last place. As integers, with the bits of float32::

    kept = (x << 16) + (low << 8)        x = (kept + 0x8000) >> 16        low = (kept >> 8) - (x << 8)

So a carry goes into the exponent, and subnormal numbers are numbers like others. Ties to even could not be told apart:
they would need both -128 and 128. Beside zero, infinity and NaN the byte is 0, and any other one does not count: there
it could change the sign, or make a NaN of an infinity. (What is kept is 0 below 2^-134, and infinite where ``x`` is.)

Whatever the byte is, ``x`` is the kept value rounded. So a byte that is stale, because other code has written into
``x``, does not contradict ``x``, and cannot be told from a right one; nor does it do harm: what was written is kept to
within half a unit of its own last place, zeros exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dtensor import IndexMap
from .sums import ROW
from .tensors import is_dense

SEED = 0x9E3779B9
FACTOR = 0xADB4A92D
EIGHTS = ROW // 8  # hashes in a row
_WORD = 0xFFFFFFFF


def _signed(word: int) -> int:
    """Returns the int32 of the same bits."""
    return word - (1 << 32) if word >> 31 else word


def shifted(words: Tensor, by: int) -> Tensor:
    """Returns int32 words shifted to the right, zeros coming in."""
    return (words >> by).bitwise_and_(_WORD >> by)


def _mix(h: Any) -> Any:
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD
    h = (h ^ h >> 15) * 0x846CA68B & _WORD
    return h ^ h >> 16


def row_bits(step: Any, tensors: Tensor, firsts: Tensor, lead: int = 0) -> Tensor:
    """Returns the random bits of a step for rows of ``ROW`` elements that are consecutive in memory.

    See Note [Random bits].

    Args:
        step: ``k``, a number or a 0-dim tensor.
        tensors: the index of each row's parameter, int64.
        firsts: the position of each row's first element, divided by 8, rounded down, int64.
        lead: what the positions of the rows' first elements are modulo 8.

    Returns:
        int32, flat.
    """
    hashes = _hashes(step, tensors, firsts, 0, EIGHTS + bool(lead))
    return _of_eights(hashes).view(len(hashes), -1)[:, lead : lead + ROW].reshape(-1)


def consecutive_bits(step: Any, tensor: int, begin: int, count: int, device: torch.device, stream: int = 0) -> Tensor:
    """Returns the random bits of ``count`` elements of one tensor that are consecutive in memory, the first of which is
    at ``begin``; otherwise as :func:`row_bits`."""
    eight, lead = divmod(begin, 8)
    left = 8 * ((1 << 32) - eight % (1 << 32)) - lead  # elements with the same word
    if count > left:
        counts = {begin: left, begin + left: count - left}
        return torch.cat([consecutive_bits(step, tensor, at, n, device, stream) for at, n in counts.items()])
    h = torch.arange(-(-(lead + count) // 8), dtype=torch.int32, device=device).add_(_signed(eight & _WORD))
    a, b = _keys(_word_of(step), tensor, 2 * (eight >> 32) + stream)
    a, b = (t.to(torch.int32) if isinstance(t, Tensor) else _signed(t) for t in (a, b))
    return _of_eights(_hash(h, a, b))[lead : lead + count]


def _of_eights(hashes: Tensor) -> Tensor:
    """Returns the bits of the eight elements of each hash, flat."""
    return (hashes.view(-1, 1) * _powers(hashes.device)).view(-1)


def _powers(device: torch.device) -> Tensor:
    # Made on the device: a copy to it would have to be waited for.
    return torch.full((8,), _signed(FACTOR), dtype=torch.int32, device=device).cumprod(0, dtype=torch.int32)


def _word_of(step: Any) -> Any:
    return step.to(torch.int64) & _WORD if isinstance(step, Tensor) else int(step) & _WORD


def _keys(step: Any, tensor: Any, word: Any) -> tuple[Any, Any]:
    """Returns a and b of Note [Random bits]: integers, or int64 if one of the arguments is a tensor."""
    a = _mix(_mix(_mix(SEED + step & _WORD) + tensor & _WORD) + word & _WORD)
    return a, _mix(_mix(_mix((~SEED & _WORD) + tensor & _WORD) + word & _WORD) + step & _WORD)


def _hash(h: Tensor, a: Any, b: Any) -> Tensor:
    """Returns the hashes of eights, given in int32, which are overwritten; a and b may be signed numbers."""
    h ^= a
    h ^= shifted(h, 16)
    h *= 0x7FEB352D
    h ^= shifted(h, 15)
    h += b
    h *= _signed(0x846CA68B)
    h ^= shifted(h, 16)
    return h


def _hashes(step: Any, tensors: Any, firsts: Tensor, stream: int, count: int) -> Tensor:
    """Returns the hashes of rows of ``count`` times 8 elements, int32[rows, count]; otherwise as :func:`row_bits`.

    Computed with 64-bit integers where there is one per row, else with 32-bit ones, which wrap around.
    """
    a, b = _keys(_word_of(step), tensors, 2 * (firsts >> 32) + stream)
    a, b, firsts = (t.to(torch.int32)[:, None] for t in (a, b, firsts))  # the lower halves
    return _hash(torch.arange(count, dtype=torch.int32, device=firsts.device) + firsts, a, b)


def random_bits(p: Tensor, step: Any, tensor: int, stream: int = 0, where: IndexMap | None = None) -> Tensor:
    """Returns the random bits of every element of ``p``, see Note [Random bits].

    Args:
        p: gives shape, strides and device.
        step: ``k``, a number or a 0-dim tensor.
        tensor: the parameter's index.
        stream: 0 for a step, 1 for a correction.
        where: the index map, if ``p`` is a shard.

    Returns:
        int32, of the shape of ``p``.
    """
    if where is not None:  # a hash for each: how many eights of the whole are in one piece depends on the shard
        g = where.indices(p.device).flatten()
        return (_hashes(step, tensor, g >> 3, stream, 1).view(-1) * _powers(p.device)[g & 7]).view(p.shape)
    bits = consecutive_bits(step, tensor, 0, p.numel(), p.device, stream)
    return bits.as_strided(p.shape, p.stride()) if is_dense(p) and p.numel() else bits.view(p.shape)


def first(bits: Tensor, count: int = 32) -> Tensor:
    """Returns the upper ``count`` of random bits, as int32: to round the first value (``x``) of the elements."""
    return bits if count == 32 else shifted(bits, 32 - count)


def second(bits: Tensor, count: int = 32) -> Tensor:
    """Returns random bits for a second value (``exp_avg_sq``) of the elements: the halves, the lower one improved by
    the upper one, exchanged; as int32, the upper ``count`` of them."""
    mixed = (bits >> 16).bitwise_xor_(bits)  # the lower half; above it is nothing that is used
    if count <= 16:
        return (mixed >> (16 - count) if count < 16 else mixed).bitwise_and_((1 << count) - 1)
    return first(shifted(bits, 16).bitwise_or_(mixed << 16), count)


def third(bits: Tensor, count: int = 32) -> Tensor:
    """Returns random bits for a third value (``s``) of the elements, the upper ``count`` of them."""
    words = bits * _signed(pow(FACTOR, 8, 1 << 32))
    if count < 32:
        words >>= 32 - count
        words &= (1 << count) - 1
    return words


def fourth(bits: Tensor, count: int = 32) -> Tensor:
    """Returns random bits for a fourth value (``delta`` in 8 bits) of the elements, the upper ``count`` of them."""
    return second(third(bits), count)


def stochastic(
    value: Tensor, dtype: torch.dtype, bits: Tensor, draw: Callable[[Tensor, int], Tensor] = first
) -> Tensor:
    """Returns ``value`` (float32) rounded to ``dtype`` (bfloat16 or float16): away from zero with probability equal to
    the fractional part (in units of the last place), else towards zero. Values that ``dtype`` can represent, infinities
    and NaN stay.

    Args:
        bits: int32, from :func:`random_bits`.
        draw: what takes from them as many as are needed.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    words = value.nan_to_num(math.nan, math.inf, -math.inf).view(torch.int32)  # a copy; NaN has a zero at the end
    words += draw(bits, dropped)
    if dtype == torch.bfloat16:
        words >>= 16
        return words.to(torch.int16).view(torch.bfloat16)
    words &= -1 << dropped
    # Subnormal: in units of 2^-24, which are the same for all.
    size = value.abs()
    subnormal = (whole_numbers(size * 2.0**24, draw(bits, 24)) * 2.0**-24).copysign(value)
    return torch.where(size < 2.0**-14, subnormal, words.view(torch.float32)).to(dtype)


def whole_numbers(values: Tensor, bits: Tensor) -> Tensor:
    """Returns float32 ``values``, none negative, rounded to whole numbers: up with a probability that is the fractional
    part.

    Args:
        bits: the upper 24 of random bits.
    """
    whole = values.floor()
    # On a CPU a comparison is ten times as fast if it need not make booleans, and `where` is slower still.
    is_up = bits.to(torch.float32).mul_(2.0**-24).lt_(values - whole)
    return whole.add_(is_up)


def _counts(x: Tensor) -> Tensor:
    """Returns 1 beside the bfloat16 numbers, given as int16, beside which a byte counts, else 0, as int16."""
    sizes = x & 0x7FFF
    return sizes.add_(0x7FFF).lt_(-0x81)  # the sum wraps around: of 1 to 0x7F7F it is below those of 0 and the others


def kept_value(x: Tensor, low: Tensor) -> Tensor:
    """Returns the kept value, a new float32 tensor, see Note [24 bits].

    Args:
        x: bfloat16.
        low: int8, of the same shape.
    """
    offsets = _counts(x.view(torch.int16)).mul_(low)
    return x.float().view(torch.int32).add_(offsets, alpha=1 << 8).view(torch.float32)


def stochastic_24(value: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``value`` (float32) rounded to 24 bits as :func:`stochastic` rounds to 16: ``x`` and ``low``, see Note
    [24 bits].

    Args:
        bits: int32, from :func:`random_bits`.
    """
    words = value.nan_to_num(math.nan, math.inf, -math.inf).view(torch.int32)  # a copy; NaN has a zero at the end
    words += first(bits, 8)
    words >>= 8  # the last byte of which is that of kept - (x << 16)
    upper = words + 0x80
    upper >>= 8
    x = upper.to(torch.int16)
    low = _counts(x).mul_(words.to(torch.int16)).to(torch.int8)
    return x.view(torch.bfloat16), low
