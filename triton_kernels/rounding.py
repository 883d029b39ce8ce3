"""Conversion between the types that arrays are stored in and the type of the arithmetic, which is all the rule sees.

The functions have the names and the order of csrc/prodigy/rounding.h and give the same bits. bfloat16 and float16 are
16-bit words here, converted by integer arithmetic: so the result is the same on every device and in the interpreter.

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
    return RandomBits(a, b)


@triton.jit
def power(e):
    """Returns FACTOR to the power 1 + e, for uint32 0 <= e < 8."""
    one = tl.where((e & 1) != 0, FACTOR, 1).to(tl.uint32)
    two = tl.where((e & 2) != 0, FACTOR**2 % 2**32, 1).to(tl.uint32)
    four = tl.where((e & 4) != 0, FACTOR**4 % 2**32, 1).to(tl.uint32)
    return times(times(one, two), times(four, FACTOR))


@triton.jit
def draw(random, position):
    """Returns 32 random bits per element: eight elements share lowbias32 with `b` added between its two rounds.

    position: the elements', int64.
    """
    h = (position >> 3).to(tl.uint32) ^ random.a
    h = times(h ^ (h >> 16), FACTOR_1)
    h = times(plus(h ^ (h >> 15), random.b), FACTOR_2)
    return times(h ^ (h >> 16), power(position.to(tl.uint32) & 7))


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

# Bits of float32: all but the sign; infinity; 1/2.
SIZE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
ONE_HALF = tl.constexpr(126 << 23)
# Of 2^-14, the smallest normal float16, and of 2^16, where float16 overflows.
HALF_NORMAL = tl.constexpr(113 << 23)
HALF_INFINITY = tl.constexpr(143 << 23)
# The difference of the exponents' biases, 127 - 15, in the place of float32's exponent.
REBIAS = tl.constexpr(112 << 23)
# Bits of float16, without the sign. Adding QUIET to a NaN of bfloat16 keeps it one when its low bits are cut off.
HALF_NAN = tl.constexpr(0x7E00)
HALF_INF = tl.constexpr(0x7C00)
QUIET = tl.constexpr(0x40)


@triton.jit
def widen(stored, TYPE: tl.constexpr):
    """Returns the value of a 16-bit word, as float32.

    float16: after Fabian Giesen's half_to_float_fast4 (https://gist.github.com/rygorous/2144712), without its branches.
    """
    word = stored.to(tl.uint32)
    if TYPE.is_bf16():
        return float_of(word << 16)
    else:
        size = (word & 0x7FFF) << 13
        # Infinity and NaN, whose exponent is 31, are moved twice, to float32's 255.
        normal = size + REBIAS + tl.where(size >= 31 << 23, REBIAS, 0).to(tl.uint32)
        subnormal = float_of(size + HALF_NORMAL) - 6.103515625e-05  # 2^-14
        return float_of(((word & 0x8000) << 16) | tl.where(size < 1 << 23, word_of(subnormal), normal))


@triton.jit
def nearest(value, TYPE: tl.constexpr):
    """Returns a float32 rounded to a 16-bit word, to nearest, ties to even."""
    word = word_of(value)
    size = word & SIZE
    if TYPE.is_bf16():
        rounded = plus(plus(word, 0x7FFF), (word >> 16) & 1) >> 16
        return tl.where(size > INFINITY, (word >> 16) | QUIET, rounded).to(tl.uint16)
    else:
        normal = plus(minus(size, REBIAS - 0xFFF), (size >> 13) & 1) >> 13
        # The last place of a float32 in [1/2, 1) is 2^-24, the unit of float16's subnormal numbers: this addition
        # rounds to them, ties to even (Giesen's float_to_half_fast3_rtne).
        subnormal = minus(word_of(float_of(size) + 0.5), ONE_HALF)
        beyond = tl.where(size > INFINITY, HALF_NAN, HALF_INF).to(tl.uint32)
        rounded = tl.where(size >= HALF_INFINITY, beyond, tl.where(size < HALF_NORMAL, subnormal, normal))
        return (((word >> 16) & 0x8000) | rounded).to(tl.uint16)


@triton.jit
def stochastic(value, random, TYPE: tl.constexpr):
    """Returns a float32 rounded to a 16-bit word, away from zero with probability (|value| - lower) / ulp.

    Else it is rounded to `lower`, the next smaller size.
    """
    word = word_of(value)
    size = word & SIZE
    if TYPE.is_bf16():
        finite = plus(word, random >> 16) >> 16
        return tl.where(size < INFINITY, finite.to(tl.uint16), nearest(value, TYPE))
    else:
        up = plus(size, random >> 19)
        normal = tl.where(up >= HALF_INFINITY, HALF_INF, minus(up, REBIAS) >> 13)
        # In units of 2^-24, the ulp of all subnormal numbers.
        units = float_of(tl.where(size < HALF_NORMAL, size, 0)) * 16777216.0  # 2^24
        whole = units.to(tl.int32)
        uniform = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8  # 2^-24
        is_up = uniform < units - whole.to(tl.float32)
        subnormal = (whole + is_up.to(tl.int32)).to(tl.uint32)
        finite = tl.where(size < HALF_NORMAL, subnormal, normal)
        return (((word >> 16) & 0x8000) | tl.where(size > INFINITY, HALF_NAN, finite)).to(tl.uint16)


@triton.jit
def displacement(x, x0, delta, TYPE: tl.constexpr):
    """Returns the displacement of a rounded x: `delta`, or x - x0 if x no longer is x0 + delta, rounded.

    In that case something else has written to x since.
    """
    return tl.where(widen(nearest(x0 + delta, TYPE), TYPE) == x, delta, x - x0)


# -- memory ------------------------------------------------------------------------------------------------------------


@triton.jit
def array(address, begin, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Returns a pointer to element `begin` of the array at an address; FULL: the pointer is a multiple of 16 bytes."""
    if TYPE.primitive_bitwidth == 16:
        pointer = address.to(tl.pointer_type(tl.uint16)) + begin
    else:
        pointer = address.to(tl.pointer_type(TYPE)) + begin
    return tl.multiple_of(pointer, 16) if FULL else pointer


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
