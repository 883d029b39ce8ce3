"""State in 8 bits: Note [8 bits] of prodigy_fused/eight_bits.py, whose numbers these are.

The functions have the names of csrc/prodigy/eight_bits.h and give the same bits, everywhere: with integers, and
operations that are rounded exactly. (Triton's own float8 is not the same for all devices and versions.)

Note [A block in a warp]
Numbers have the shape [parts, blocks, elements of a part], as `places` says. On an NVIDIA GPU a block of 256 is then in
one warp, which finds the largest of it without the others. A block's unit, and its byte, are [1, blocks, 1].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .elements import masked
from .rounding import array, float_of, minus, plus, second, third, word_of

CODE_BLOCK = tl.constexpr(256)  # elements
# The kinds of codes, each with its byte of a block's scale.
M = tl.constexpr(0)
ROOT = tl.constexpr(1)
S_CODE = tl.constexpr(2)
DELTA = tl.constexpr(3)
CODES = tl.constexpr(4)
LANES = tl.constexpr(32)  # of a warp


@triton.constexpr_function
def largest_code(code):
    """Returns the number of the largest code, as bits of float32: 448, 255, 252 or 127."""
    return {M.value: 0x43E00000, ROOT.value: 0x437F0000, S_CODE.value: 0x437C0000, DELTA.value: 0x42FE0000}[code]


@triton.constexpr_function
def largest_size(code):
    """Returns the largest size that a number may have."""
    largest = {M.value: 448 * 2.0**98, ROOT.value: 255 * 2.0**56, S_CODE.value: 252 * 2.0**119}
    return largest.get(code, 127 * 2.0**119)


@triton.constexpr_function
def bias(code):
    """Returns what byte b is a unit of 2^(b - bias) with."""
    return 74 if code == ROOT.value else 126


@triton.constexpr_function
def least_byte(code):
    """Returns the least byte that a block is given."""
    return 7 if code == M.value else 0


@triton.constexpr_function
def fraction_bits(code):
    """Returns of how many bits the fraction is, for the rounding."""
    return 16 if code == S_CODE.value else 15


@triton.jit
def fourth(bits):
    """Returns random bits for a fourth value of the same element (delta), next to x, v and s."""
    return second(third(bits))


@triton.jit
def rounded(steps, random, CODE: tl.constexpr):
    """Returns numbers in steps of their codes, rounded, uint32.

    steps: the lowest bits of the word are those of fixed point, see Note [8 bits].
    """
    fraction: tl.constexpr = (1 << fraction_bits(CODE)) - 1
    return plus(word_of(steps), (random >> 16) & fraction) >> fraction_bits(CODE)


# -- e4m3 --------------------------------------------------------------------------------------------------------------

# The smallest normal number; the bits of 2^14; the difference of the exponents' biases, in the place of float32's.
NORMAL = tl.constexpr(2.0**-6)
TWO_TO_14 = tl.constexpr(141 << 23)
REBIAS = tl.constexpr(120 << 23)


@triton.jit
def e4m3_nearest(units):
    """Returns the code of a size in units, at most 448, rounded to nearest, ties to even."""
    word = word_of(units)
    normal = minus(plus(word, (word >> 20) & 1), REBIAS - 0x7FFFF) >> 20
    # The last place of a number from 2^14 on is 2^-9, the unit of subnormal ones.
    subnormal = minus(word_of(units + 16384.0), TWO_TO_14)
    return tl.where(units < NORMAL, subnormal, normal)


@triton.jit
def e4m3_number(code):
    """Returns the number, in units, of a code."""
    # As float32, sign, exponent and mantissa are 2^-120 of it, for the exponents' biases differ by so much; also if
    # it is subnormal.
    word = (code.to(tl.int8).to(tl.int32) << 20).to(tl.uint32) & 0x87F00000
    return float_of(word) * 1.329227995784916e36  # 2^120


# -- e2m5 --------------------------------------------------------------------------------------------------------------


@triton.jit
def e2m5_stochastic(units, random):
    """Returns the code of a size in units, at most 252, rounded stochastically in steps of 1, 2 or 4 units."""
    steps = tl.minimum(units + 128.0, tl.minimum(units * 0.5 + 160.0, units * 0.25 + 192.0))
    return rounded(steps, random, S_CODE) & 0x7F


@triton.jit
def e2m5_number(code):
    """Returns the number, in units, of a code."""
    word = (code.to(tl.int8).to(tl.int32) << 18).to(tl.uint32)
    # Half of it if it is normal; of a subnormal one, the smallest normal number is still to be taken from twice this.
    half = plus(word & 0x01FC0000, 131 << 23)
    size = float_of(plus(half, 1 << 23)) - float_of(tl.maximum(half, 132 << 23))
    return float_of(word_of(size) | (word & 0x80000000))


# -- codes and numbers -------------------------------------------------------------------------------------------------


@triton.jit
def unit(byte, CODE: tl.constexpr):
    """Returns the unit of a block."""
    return float_of((byte.to(tl.uint32) + (127 - bias(CODE))) << 23)


@triton.jit
def byte_of(sizes, CODE: tl.constexpr):
    """Returns the bytes of blocks, uint32, from the sizes of their numbers."""
    carry: tl.constexpr = 0x7FFFFF - (largest_code(CODE) & 0x7FFFFF)
    zero: tl.constexpr = (largest_code(CODE) >> 23) - bias(CODE)
    largest = tl.max(tl.max(word_of(sizes), 2), 0)[None, :, None]
    return minus(tl.maximum((largest + carry) >> 23, zero + least_byte(CODE)), zero)


@triton.jit
def decoded(code, byte, CODE: tl.constexpr):
    """Returns the numbers of codes, bytes, and of their blocks' bytes."""
    if CODE == M:
        number = e4m3_number(code)
    elif CODE == S_CODE:
        number = e2m5_number(code)
    else:
        number = code.to(tl.float32)
    return number * unit(byte, CODE)


@triton.jit
def encoded(value, random, CODE: tl.constexpr):
    """Returns the codes of numbers, as they are stored, and the bytes of their blocks. random: not used for M."""
    size, sign = tl.minimum(tl.abs(value), largest_size(CODE)), word_of(value) & 0x80000000
    byte = byte_of(size, CODE)
    scaled = size * float_of(minus(127 + bias(CODE), byte) << 23)
    if CODE == M:
        code = (e4m3_nearest(scaled) | (sign >> 24)).to(tl.uint8)
    elif CODE == S_CODE:
        code = (e2m5_stochastic(scaled, random) | (sign >> 24)).to(tl.uint8)
    elif CODE == ROOT:
        code = tl.maximum(rounded(scaled + 256.0, random, ROOT) & 0xFF, tl.minimum(word_of(size), 1)).to(tl.uint8)
    else:
        signed = float_of(word_of(scaled) | sign)
        code = (rounded(signed + 384.0, random, DELTA) ^ 0x80).to(tl.int8)
    return code, byte.to(tl.uint8)


# -- memory ------------------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """The elements of a chunk that a program takes at a time, and their blocks of codes."""

    i: Any
    mask: Any
    block: Any
    is_block: Any


@triton.jit
def places(first, size, X: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the places of BLOCK elements of a chunk; first: a multiple of CODE_BLOCK.

    A thread has 16 bytes of x in each part, and a warp has 32 threads: so a block of float32 is in two parts. As the
    compiler would give a thread more codes that are side by side, and exchange them, it is not told of these.
    """
    PARTS: tl.constexpr = X.primitive_bitwidth // 16
    PART: tl.constexpr = CODE_BLOCK // PARTS
    block = first // CODE_BLOCK + tl.arange(0, BLOCK // CODE_BLOCK)[None, :, None]
    i = block * CODE_BLOCK + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    i = tl.max_contiguous(i, [1, 1, 128 // X.primitive_bitwidth])
    return Places(i, i < size, block, block * CODE_BLOCK < size)


@triton.jit
def places_if(condition, at):
    """Returns places, none of them if a condition does not hold."""
    return Places(at.i, masked(condition, at.mask), at.block, masked(condition, at.is_block))


@triton.jit
def code_array(address, begin, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns a pointer to element `begin` of an array of codes."""
    return array(address, begin, tl.int8 if CODE == DELTA else tl.uint8, ALIGNED)


@triton.jit
def scale_array(address, begin):
    """Returns a pointer to the scale of the block that element `begin` is the first of."""
    return array(address, begin // (CODE_BLOCK // CODES), tl.uint8, False)


@triton.jit
def load_codes(codes, scale, at, CODE: tl.constexpr):
    """Returns the numbers at places, 0 where they are masked out."""
    return decoded(tl.load(codes + at.i, at.mask, 0), tl.load(scale + at.block * CODES + CODE, at.is_block, 0), CODE)


@triton.jit
def store_codes(codes, scale, value, random, at, CODE: tl.constexpr):
    """Writes numbers, which are 0 where they are masked out; returns them as they are stored."""
    code, byte = encoded(value, random, CODE)
    tl.store(codes + at.i, code, at.mask)
    lane = tl.arange(0, LANES)[None, None, :]  # in this shape, too, a block is in one warp: nothing is exchanged
    tl.store(scale + at.block * CODES + lane, byte, at.is_block & (lane == CODE))
    return decoded(code, byte, CODE)
