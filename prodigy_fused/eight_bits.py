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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .dtensor import local
from .options import Group
from .rounding import shifted

BLOCK = 256
_MANTISSA = 0x7FFFFF


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


def _in_blocks(flat: Tensor) -> Tensor:
    missing = blocks_of(flat.numel()) * BLOCK - flat.numel()
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def _power(exponents: Tensor) -> Tensor:
    """Returns 2 to the power of exponents from -126 to 127."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def _word(number: float) -> int:
    """Returns the bits of a float32."""
    (word,) = struct.unpack("<i", struct.pack("<f", number))
    return int(word)


def _bytes(code: Code, sizes: Tensor) -> Tensor:
    """Returns the byte of each block, int32, from the sizes of its elements, as bits."""
    largest = _word(code.largest)
    carry = _MANTISSA - (largest & _MANTISSA)  # into the exponent of what is above a power of two times `largest`
    least = (largest >> 23) - code.bias  # the exponent that is byte 0
    found: Tensor = (((sizes.amax(1) + carry) >> 23) - least).clamp_(min=code.least_byte)
    return found


def _codes(code: Code, sizes: Tensor, negative: Tensor, scale: Tensor, bits: Tensor | None) -> Tensor:
    """Returns codes in their storage dtype, in blocks."""
    units = sizes.view(torch.float32) * _power(code.bias - scale)[:, None]
    if code.format == "e4m3":  # to nearest, always
        return units.to(torch.float8_e4m3fn).view(torch.uint8) + (negative * 0x80).to(torch.uint8)
    # In steps of the code: the fraction is the lowest bits of the float32.
    if code.format == "e2m5":
        steps = torch.minimum(units + 128, torch.minimum(units * 0.5 + 160, units * 0.25 + 192))
    elif code.format == "whole":
        steps = units + 256
    else:
        steps = torch.where(negative, -units, units) + 384
    draws = 1 << code.places - 1 if bits is None else shifted(bits, 16) & (1 << code.places) - 1
    whole = (steps.view(torch.int32) + draws) >> code.places
    if code.format == "e2m5":
        return (whole & 0x7F | 0x80 * negative).to(torch.uint8)
    if code.format == "whole":
        return torch.maximum(whole & 0xFF, (sizes > 0).to(whole.dtype)).to(torch.uint8)
    return ((whole & 0xFF) - 128).to(torch.int8)


def _numbers(code: Code, codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the numbers of blocks of codes."""
    numbers = codes.view(torch.float8_e4m3fn).float() if code.format == "e4m3" else codes.float()
    if code.format == "e2m5":
        size = numbers % 128
        size = torch.where(size < 64, size, torch.where(size < 96, 2 * size - 64, 4 * size - 256))
        numbers = torch.where(numbers < 128, size, -size)
    return numbers * _power(scale.to(torch.int32) - code.bias)[:, None]


def encode(code: Code, flat: Tensor, bits: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the codes of numbers, and their blocks' bytes of scale.

    Args:
        flat: float32, in the order of memory; of "exp_avg_sq", roots.
        bits: int32 of the same shape, random; None: all are rounded to nearest.
        scale: uint8, bytes that are taken where the numbers are whole codes with them.

    Returns:
        Flat, in the storage dtype of the code; and uint8, one for each block.
    """
    words = _in_blocks(flat).view(torch.int32)
    negative, sizes = words < 0, (words & 0x7FFFFFFF).clamp_(max=_word(code.largest * 2.0**code.largest_unit))
    least = _bytes(code, sizes)
    draws = None if bits is None or code.column == 0 else _in_blocks(bits)
    codes = _codes(code, sizes, negative, least, draws)
    if scale is not None:
        given = torch.maximum(scale.to(torch.int32), least)
        others = _codes(code, sizes, negative, given, None)
        exact = (_numbers(code, others, given).abs() == sizes.view(torch.float32)).all(1)
        codes, least = torch.where(exact[:, None], others, codes), torch.where(exact, given, least)
    return codes.flatten()[: flat.numel()], least.to(torch.uint8)


def decode(code: Code, codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the numbers of codes, flat and in the order of memory; of "exp_avg_sq", roots. The inverse of encode."""
    return _numbers(code, _in_blocks(codes), scale).flatten()[: codes.numel()]
