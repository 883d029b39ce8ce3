"""Conversion between the types that arrays are stored in and the type of the arithmetic, which is all the rule sees.

The functions have the names and the order of csrc/prodigy/rounding.h and give the same bits. bfloat16 and float16 are
16-bit words here, converted by integer arithmetic, but for what IEEE 754 asks of every device (float16 to and from
float32): so the result is the same on every device and in the interpreter.

prodigy_fused/low_precision.py says which arrays are rounded in which way, prodigy_fused/rounding.py with which random
bits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


# Arithmetic that may wrap around. (Triton's debug mode reports an overflow in the operators as an error.)
@triton.jit
def plus(a, b):
    """Returns a + b, modulo 2^32."""
    return tl.add(a, b, sanitize_overflow=False)


@triton.jit
def minus(a, b):
    """Returns a - b, modulo 2^32."""
    return tl.sub(a, b, sanitize_overflow=False)


@triton.jit
def times(a, b):
    """Returns a * b, modulo 2^32."""
    return tl.mul(a, b, sanitize_overflow=False)


@triton.jit
def word_of(value):
    """Returns the bits of a float32, as uint32."""
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(word):
    """Returns the float32 with these bits."""
    return word.to(tl.float32, bitcast=True)


# -- random bits -------------------------------------------------------------------------------------------------------

SEED = tl.constexpr(0x9E3779B9)
NOT_SEED = tl.constexpr(0x61C88646)
# Separate streams for a step and for a later change, by *finish*, to an x that has taken its step.
STEP_STREAM = tl.constexpr(0)
CORRECTION_STREAM = tl.constexpr(1)
# Of the hash "lowbias32" by Chris Wellons (https://nullprogram.com/blog/2018/07/31/).
FACTOR_1 = tl.constexpr(0x7FEB352D)
FACTOR_2 = tl.constexpr(0x846CA68B)
# Of a multiplicative generator (Steele and Vigna, "Computationally easy, spectrally good multipliers for congruential
# pseudorandom number generators", 2021).
FACTOR = tl.constexpr(0xADB4A92D)


class RandomBits(NamedTuple):
    """The hashes that all elements of a chunk share, see Note [Random bits] of prodigy_fused/rounding.py."""

    a: Any
    b: Any
    eight: Any  # the chunk's first position / 8, modulo 2^32
    lead: Any  # and modulo 8, not 0 in some shards


@triton.jit
def mix(h):
    """Returns a hash of 32 bits: lowbias32."""
    h = times(h ^ (h >> 16), FACTOR_1)
    h = times(h ^ (h >> 15), FACTOR_2)
    return h ^ (h >> 16)


@triton.jit
def random_bits(k, tensor, stream, begin):
    """Returns what `draw` needs for the elements from position `begin` on, in step k.

    The positions of these elements must agree in all but their low 35 bits.
    """
    word = ((begin >> 35) * 2 + stream).to(tl.uint32)
    a = mix(plus(mix(plus(mix(plus(k, SEED)), tensor)), word))
    b = mix(plus(mix(plus(mix(plus(tensor, NOT_SEED)), word)), k))
    return RandomBits(a, b, (begin >> 3).to(tl.uint32), (begin & 7).to(tl.int32))


@triton.jit
def power(e):
    """Returns FACTOR to the power 1 + e, for uint32 0 <= e < 8."""
    one = tl.where((e & 1) != 0, FACTOR, 1).to(tl.uint32)
    two = tl.where((e & 2) != 0, FACTOR**2 % 2**32, 1).to(tl.uint32)
    four = tl.where((e & 4) != 0, FACTOR**4 % 2**32, 1).to(tl.uint32)
    return times(times(one, two), times(four, FACTOR))


@triton.jit
def draw(random, i):
    """Returns 32 random bits per element: eight elements share lowbias32 with `b` added between its two rounds.

    i: the elements' positions behind the first of the eight that the chunk begins in, int32. Where a thread has eight
    that share a hash, the compiler sees it: it computes one, and knows the eight powers.
    """
    h = plus((i >> 3).to(tl.uint32), random.eight) ^ random.a
    h = times(h ^ (h >> 16), FACTOR_1)
    h = times(plus(h ^ (h >> 15), random.b), FACTOR_2)
    return times(h ^ (h >> 16), power((i & 7).to(tl.uint32)))


@triton.jit
def second(bits):
    """Returns random bits for a second value of the same element (v, next to x).

    The halves, the lower one improved by the upper one, are exchanged.
    """
    bits = bits ^ (bits >> 16)
    return (bits << 16) | (bits >> 16)


@triton.jit
def third(bits):
    """Returns random bits for a third value of the same element (s)."""
    return times(bits, FACTOR**8 % 2**32)


# -- bfloat16 and float16, as bits -------------------------------------------------------------------------------------

# Bits of float32: all but the sign.
SIZE = tl.constexpr(0x7FFFFFFF)
# Of 2^-14, the smallest normal float16, and of 2^16, where float16 overflows.
HALF_NORMAL = tl.constexpr(113 << 23)
HALF_INFINITY = tl.constexpr(143 << 23)
# The difference of the exponents' biases, 127 - 15, in the place of float32's exponent.
REBIAS = tl.constexpr(112 << 23)
# Bits of float16, without the sign.
HALF_NAN = tl.constexpr(0x7E00)
HALF_INF = tl.constexpr(0x7C00)

# Note [NaN]
# What is rounded is the result of an operation: if it is a NaN, then a quiet one, which stays one when its low bits are
# cut off. But all its bits may be set, and what is added to it would overflow.


@triton.jit
def addable(value):
    """Returns the bits of a float32, to which up to 0xFFFF may be added: see Note [NaN]."""
    return tl.minimum(value.to(tl.int32, bitcast=True), 0x7FFF0000).to(tl.uint32, bitcast=True)


@triton.jit
def widen(stored, TYPE: tl.constexpr):
    """Returns the value of a 16-bit word, as float32."""
    if TYPE.is_bf16():
        return float_of(stored.to(tl.uint32) << 16)
    else:
        return stored.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nearest(value, TYPE: tl.constexpr):
    """Returns a float32 rounded to a 16-bit word, to nearest, ties to even."""
    if TYPE.is_bf16():
        word = addable(value)
        return (plus(word, ((word >> 16) & 1) + 0x7FFF) >> 16).to(tl.uint16)
    else:
        return value.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def stochastic(value, random, TYPE: tl.constexpr):
    """Returns a float32 rounded to a 16-bit word, away from zero with probability (|value| - lower) / ulp.

    Else it is rounded to `lower`, the next smaller size.
    """
    if TYPE.is_bf16():
        return (plus(addable(value), random >> 16) >> 16).to(tl.uint16)
    else:
        word = word_of(value)
        size = word & SIZE
        up = plus(size, random >> 19)
        normal = tl.where(up >= HALF_INFINITY, HALF_INF, minus(up, REBIAS) >> 13)
        # In units of 2^-24, the ulp of all subnormal numbers.
        units = float_of(tl.where(size < HALF_NORMAL, size, 0)) * 16777216.0  # 2^24
        whole = units.to(tl.int32)
        uniform = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8  # 2^-24
        is_up = uniform < units - whole.to(tl.float32)
        subnormal = (whole + is_up.to(tl.int32)).to(tl.uint32)
        finite = tl.where(size < HALF_NORMAL, subnormal, normal)
        return (((word >> 16) & 0x8000) | tl.where(value == value, finite, HALF_NAN)).to(tl.uint16)


# 24 bits: a bfloat16 and a byte, see Note [24 bits] of prodigy_fused/rounding.py.


@triton.jit
def byte_counts(x):
    """Returns beside which bfloat16 numbers, given as words, a byte counts: not zero, infinity and NaN."""
    return minus(x.to(tl.uint32) & 0x7FFF, 1) < 0x7F7F


@triton.jit
def kept_value(x, low):
    """Returns the float32 that a bfloat16, given as a word, and a byte keep."""
    offset = (low.to(tl.int32) << 8).to(tl.uint32, bitcast=True)
    return float_of(plus(x.to(tl.uint32) << 16, tl.where(byte_counts(x), offset, 0)))


@triton.jit
def stochastic_24(value, random):
    """Returns a float32 rounded to 24 bits: a word and a byte."""
    word = plus(addable(value), random >> 24)
    x = (plus(word, 0x8000) >> 16).to(tl.uint16)
    return x, tl.where(byte_counts(x), word >> 8, 0).to(tl.int8)  # x has no bits in the byte: it is the difference's


@triton.jit
def displacement(x, x0, delta, TYPE: tl.constexpr):
    """Returns the displacement of a rounded x: `delta`, or x - x0 if x no longer is x0 + delta, rounded.

    In that case something else has written to x since.
    """
    return tl.where(widen(nearest(x0 + delta, TYPE), TYPE) == x, delta, x - x0)


# -- memory ------------------------------------------------------------------------------------------------------------


@triton.jit
def array(address, begin, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns a pointer to element `begin` of the array at an address; ALIGNED: it is a multiple of 16 bytes."""
    if TYPE.primitive_bitwidth == 16:
        pointer = address.to(tl.pointer_type(tl.uint16)) + begin
    else:
        pointer = address.to(tl.pointer_type(TYPE)) + begin
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load(pointers, mask, TYPE: tl.constexpr):
    """Returns elements of an array of any TYPE in the type of the arithmetic, 0 where they are masked out."""
    if TYPE.primitive_bitwidth == 16:
        return widen(tl.load(pointers, mask, 0), TYPE)
    else:
        return tl.load(pointers, mask, 0.0)


@triton.jit
def store(pointers, value, mask, TYPE: tl.constexpr, is_stochastic=False, random=0):
    """Writes elements of an array of any TYPE.

    A TYPE of 16 bits is rounded to nearest or, if is_stochastic, stochastically with these random bits.
    """
    if TYPE.primitive_bitwidth == 16:
        rounded = stochastic(value, random, TYPE) if is_stochastic else nearest(value, TYPE)
        tl.store(pointers, rounded, mask)
    else:
        tl.store(pointers, value, mask)
