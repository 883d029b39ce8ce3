"""State in 8 bits: codes, and a scale for every block of them.

Note [8 bits]
Elements that are consecutive in memory (in row-major order, if there are gaps) form blocks of 256; the last one of a
tensor may be shorter. A block has four bytes of ``scale``, one for each of the codes that its elements may have; byte
``b`` stands for a unit that is a power of two, so that scaling is exact:

============= ======== ======================== =================== ================== =======
codes         dtype    the number is            of                  rounded            largest
============= ======== ======================== =================== ================== =======
exp_avg       uint8    e4m3(code) * 2^(b - 126) ``m``               to nearest         448
exp_avg_sq    uint8    code * 2^(b - 74)        the root of ``v``   stochastically     255
s             uint8    e2m5(code) * 2^(b - 126) ``s``               stochastically     252
delta         int8     code * 2^(b - 126)       ``x - x0``          stochastically     127
============= ======== ======================== =================== ================== =======

e4m3 is the 8-bit floating point of the Open Compute Project, ``torch.float8_e4m3fn``. e2m5 has, behind the sign, two
bits of exponent and five of mantissa: a size is 0 to 63 units in steps of one, up to 126 in steps of two, up to 252 in
steps of four. Its steps are that short because ``s`` is a sum over some thousand steps, each of which rounds it anew:
with steps longer than what is added, as those of e4m3 are, ``|s|`` becomes 20 % too large where gradients are noise.

The unit is the least with which no size in the block is above *largest*. That is the number of a code, so rounding
never goes beyond it, and nothing has to be cut off: what grows by little in a step does grow. Sizes, also those that
are not finite, are at most *largest* times 2^98, 2^56, 2^119 and 2^119: so ``v`` is finite, and so are the sums that
kernels make with numbers that they have not scaled. For these, the byte of m is at least 7, but in fresh state, which
is zeros, codes and scale. A root that is not 0 is at least one unit, for the step of an element whose ``v`` is
rounded to 0 would have any size.

What is rounded stochastically is first put into the steps between codes, in fixed point: its fraction has 16 bits for s
and 15 for the others, rounded to nearest, and as many random bits are added to it. These are bits of a float32, for
that of a root is the sum with 256 units, that of delta with 384; of s, 128 units added to the size, 160 to half of it,
or 192 to a quarter, whichever is least.

The step of ``x`` is made of the numbers that are stored for m and v, and ``delta`` grows by what ``x`` does change, so
that ``x - delta`` remains ``x0``, on average. What other code writes to ``x`` moves the start as well.

With ``slice_p > 1`` there are few samples: ``s`` stays float32 and ``p0`` is kept instead of ``delta``.

Numbers that are decoded and encoded again stay the same. So do their codes if the scale is kept beside the numbers:
two units may serve a block, and a step takes the least one before it rounds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .dtensor import local
from .options import Group
from .rounding import first

BLOCK = 256
_MANTISSA = 0x7FFFFF
_SIGN = -1 << 31


class Code(NamedTuple):
    """One row of the table in Note [8 bits]."""

    column: int  # of scale
    largest: float
    bias: int  # byte b is a unit of 2^(b - bias)
    format: Literal["e4m3", "e2m5", "whole", "signed"]
    largest_unit: int  # its exponent
    least_byte: int = 0
    places: int = 15  # of the fraction, for the rounding

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the tensor of codes."""
        return torch.int8 if self.format == "signed" else torch.uint8


CODES = {
    "exp_avg": Code(0, 448, 126, "e4m3", 98, least_byte=7),
    "exp_avg_sq": Code(1, 255, 74, "whole", 56),
    "s": Code(2, 252, 126, "e2m5", 119, places=16),
    "delta": Code(3, 127, 126, "signed", 119),
}


def is_coded(p: Tensor, group: Group) -> bool:
    """Returns whether the state of ``p`` (of a DTensor, of this rank's tensor) is in 8 bits."""
    if group["state_dtype"] != "8bit" or (p.dtype == torch.float64 and group["min_8bit_size"] > 0):
        return False  # 0: of a state that is in codes, whatever the parameter was cast to since
    return bool(local(p).numel() >= group["min_8bit_size"])


def moves_in_codes(p: Tensor, group: Group) -> bool:
    """Returns whether codes of ``x - x0`` are kept in the place of ``x0``."""
    return is_coded(p, group) and group["slice_p"] == 1 and not group.get("frozen", False)


def blocks_of(numel: int) -> int:
    """Returns how many blocks so many elements have."""
    return -(-numel // BLOCK)


def _powers(exponents: Tensor) -> Tensor:
    """Returns a column of powers of two, given as the exponents of float32 are, 1 to 254."""
    return (exponents << 23).view(torch.float32)[:, None]


@cache
def _word(number: float) -> int:
    """Returns the bits of a float32."""
    (word,) = struct.unpack("<i", struct.pack("<f", number))
    return int(word)


def _bytes(code: Code, blocks: Tensor) -> Tensor:
    """Returns the byte of each block, int32, from a row of the sizes of its elements, as bits."""
    largest = _word(code.largest)
    carry = _MANTISSA - (largest & _MANTISSA)  # into the exponent of what is above a power of two times `largest`
    least = (largest >> 23) - code.bias  # the exponent that is byte 0
    found: Tensor = (((blocks.amax(1) + carry) >> 23) - least).clamp_(min=code.least_byte)
    return found


def _codes(code: Code, blocks: Tensor, words: Tensor, scale: Tensor, draws: Tensor | None) -> Tensor:
    """Returns codes in their storage dtype, flat.

    Args:
        blocks: a row of sizes for each, as bits; they are overwritten.
        words: the numbers, as bits, flat, of which the signs are taken.
        draws: as many random bits as the fraction has; None: all are rounded to nearest.
    """
    units = blocks.view(torch.float32).mul_(_powers(127 + code.bias - scale)).view(-1)[: len(words)]
    if code.format in ("e4m3", "signed"):
        units.view(torch.int32).bitwise_or_(words & _SIGN)
    if code.format == "e4m3":  # to nearest, always
        return units.to(torch.float8_e4m3fn).view(torch.uint8)
    # In steps of the code: the fraction is the lowest bits of the float32, the code the byte above.
    if code.format == "e2m5":
        steps = units + 128
        for offset in (160, 192):
            torch.minimum(steps, units.mul_(0.5) + offset, out=steps)
    else:
        steps = units.add_(256 if code.format == "whole" else 384)
    whole = steps.view(torch.int32)
    whole += 1 << code.places - 1 if draws is None else draws
    whole >>= code.places
    if code.format == "signed":
        return whole.sub_(128).to(torch.int8)
    if code.format == "e2m5":
        return whole.add_(words >> 31, alpha=128).to(torch.uint8)
    least = words.clamp(max=1)  # 1 for what is not 0; of -0, the lowest byte is 0
    return torch.maximum(whole.to(torch.uint8), least.to(torch.uint8))


def _write_units(code: Code, codes: Tensor, numbers: Tensor) -> None:
    """Sets ``numbers`` to those of codes if the unit is 1."""
    if code.format == "e4m3":
        every = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn)
        torch.index_select(every.to(torch.float32), 0, codes.to(torch.int32), out=numbers)
    elif code.format == "e2m5":  # the largest of N, 2 N - 64 and 4 N - 256, in bytes, of which 256 are none
        size = codes & 0x7F
        numbers.copy_((size + size.clamp(min=64)).add_(size.clamp_(min=96), alpha=2))
        numbers.view(torch.int32).bitwise_or_(codes.view(torch.int8).to(torch.int32).bitwise_and_(_SIGN))
    else:
        numbers.copy_(codes)


def encode(
    code: Code,
    flat: Tensor,
    bits: Tensor | None = None,
    scale: Tensor | None = None,
    draw: Callable[[Tensor, int], Tensor] = first,
) -> tuple[Tensor, Tensor]:
    """Returns the codes of numbers, and their blocks' bytes of scale.

    Args:
        flat: float32, in the order of memory; of "exp_avg_sq", roots.
        bits: int32 of the same shape, random; None: all are rounded to nearest.
        scale: uint8, bytes that are taken where the numbers are whole codes with them.
        draw: what takes from ``bits`` as many as are needed.

    Returns:
        Flat, in the storage dtype of the code; and uint8, one for each block.
    """
    words, count = flat.view(torch.int32), len(flat)
    blocks = words.new_empty(blocks_of(count), BLOCK)
    blocks.view(-1)[count:] = 0
    torch.bitwise_and(words, ~_SIGN, out=blocks.view(-1)[:count])
    least = _bytes(code, blocks.clamp_(max=_word(code.largest * 2.0**code.largest_unit)))
    draws = None
    if bits is not None and code.format != "e4m3":
        draws = draw(bits, 16) if code.places == 16 else draw(bits, 16).bitwise_and_(0x7FFF)
    sizes = blocks.clone() if scale is not None else blocks
    codes = _codes(code, blocks, words, least, draws)
    if scale is not None:
        given = torch.maximum(scale.to(torch.int32), least)
        others = _codes(code, sizes.clone(), words, given, None)
        blocks = torch.zeros_like(sizes, dtype=torch.float32)
        blocks.view(-1)[:count] = decode(code, others, given).abs()
        exact = (blocks == sizes.view(torch.float32)).all(1)
        codes = torch.where(exact.repeat_interleave(BLOCK)[:count], others, codes)
        least = torch.where(exact, given, least)
    return codes, least.to(torch.uint8)


def decode(code: Code, codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the numbers of codes, flat and in the order of memory; of "exp_avg_sq", roots. The inverse of encode."""
    blocks = torch.empty(len(scale), BLOCK, dtype=torch.float32, device=codes.device)
    numbers = blocks.view(-1)[: len(codes)]  # behind the last one may be anything
    _write_units(code, codes, numbers)
    blocks.mul_(_powers(scale.to(torch.int32) + (127 - code.bias)))
    return numbers
