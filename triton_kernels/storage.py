"""From the types that arrays are stored in to the type of the arithmetic, and back: the rule sees only the latter.

The functions have the names and the order of csrc/prodigy/storage.h, and give the same bits. bfloat16 and float16 are
16-bit words here, which integer arithmetic takes apart: the same on every device, and in the interpreter.

Which of them are rounded how, and with which random bits, prodigy_fused/low_precision.py says.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


# Arithmetic that may wrap around. (Triton's debug mode takes that for a mistake where operators do it.)
@triton.jit
def plus(a, b):
    """a + b, modulo 2^32."""
    return tl.add(a, b, sanitize_overflow=False)


@triton.jit
def minus(a, b):
    """a - b, modulo 2^32."""
    return tl.sub(a, b, sanitize_overflow=False)


@triton.jit
def times(a, b):
    """a * b, modulo 2^32."""
    return tl.mul(a, b, sanitize_overflow=False)


@triton.jit
def word_of(value):
    """The bits of a float32."""
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(word):
    """The float32 with these bits."""
    return word.to(tl.float32, bitcast=True)


# -- random bits -------------------------------------------------------------------------------------------------------

SEED = tl.constexpr(0x9E3779B9)
NOT_SEED = tl.constexpr(0x61C88646)
# What bits are drawn for: a step, or what is added to an x that is rounded already.
STEP_STREAM = tl.constexpr(0)
CORRECTION_STREAM = tl.constexpr(1)


class RandomBits(NamedTuple):
    """Note [Random bits] of low_precision.py: what the elements of a chunk have in common."""

    a: Any
    b: Any


@triton.jit
def mix(h):
    """A hash of 32 bits."""
    h = times(h ^ (h >> 16), 0x7FEB352D)
    h = times(h ^ (h >> 15), 0x846CA68B)
    return h ^ (h >> 16)


@triton.jit
def random_bits(k, tensor, stream, begin):
    """For elements from position `begin` on, which must agree in all but the low 32 bits of their positions."""
    word = ((begin >> 32) * 2 + stream).to(tl.uint32)
    a = mix(plus(mix(plus(mix(plus(k, SEED)), tensor)), word))
    b = mix(plus(mix(plus(mix(plus(tensor, NOT_SEED)), word)), k))
    return RandomBits(a, b)


@triton.jit
def draw(random, low):
    """The bits of elements; low: the low 32 bits of their positions."""
    h = low ^ random.a
    h = times(h ^ (h >> 16), 0x7FEB352D)
    h = times(plus(h ^ (h >> 15), random.b), 0x846CA68B)
    return h ^ (h >> 16)


@triton.jit
def exchanged(bits):
    """For the second number of an element that is rounded."""
    return (bits << 16) | (bits >> 16)


# -- bfloat16 and float16, as bits -------------------------------------------------------------------------------------

SIZE = tl.constexpr(0x7FFFFFFF)  # all but the sign
INFINITY = tl.constexpr(0x7F800000)
# Of float16's 2^-14, the least normal number, and 2^16, which it does not have.
HALF_NORMAL = tl.constexpr(113 << 23)
HALF_INFINITY = tl.constexpr(143 << 23)


@triton.jit
def widen(stored, TYPE: tl.constexpr):
    """The float32 of a 16-bit word."""
    word = stored.to(tl.uint32)
    if TYPE.is_bf16():
        return float_of(word << 16)
    else:
        size = (word & 0x7FFF) << 13
        normal = size + (112 << 23) + tl.where(size >= 31 << 23, 112 << 23, 0).to(tl.uint32)
        subnormal = float_of(size + HALF_NORMAL) - 6.103515625e-05  # 2^-14
        return float_of(((word & 0x8000) << 16) | tl.where(size < 1 << 23, word_of(subnormal), normal))


@triton.jit
def nearest(value, TYPE: tl.constexpr):
    """The 16-bit word nearest to a float32; ties to even."""
    word = word_of(value)
    size = word & SIZE
    if TYPE.is_bf16():
        rounded = plus(plus(word, 0x7FFF), (word >> 16) & 1) >> 16
        return tl.where(size > INFINITY, (word >> 16) | 0x40, rounded).to(tl.uint16)
    else:
        normal = plus(minus(size, (112 << 23) - 0xFFF), (size >> 13) & 1) >> 13
        # To a sum with 1/2, float32's last place is float16's 2^-24.
        subnormal = minus(word_of(float_of(size) + 0.5), 126 << 23)
        beyond = tl.where(size > INFINITY, 0x7E00, 0x7C00).to(tl.uint32)
        rounded = tl.where(size >= HALF_INFINITY, beyond, tl.where(size < HALF_NORMAL, subnormal, normal))
        return (((word >> 16) & 0x8000) | rounded).to(tl.uint16)


@triton.jit
def stochastic(value, random, TYPE: tl.constexpr):
    """Up in size with the probability that is the part of a unit to the next smaller number."""
    word = word_of(value)
    size = word & SIZE
    if TYPE.is_bf16():
        finite = plus(word, random >> 16) >> 16
        return tl.where(size < INFINITY, finite.to(tl.uint16), nearest(value, TYPE))
    else:
        up = plus(size, random >> 19)
        normal = tl.where(up >= HALF_INFINITY, 0x7C00, minus(up, 112 << 23) >> 13)
        # In units of 2^-24, the same for all subnormal numbers.
        units = float_of(tl.where(size < HALF_NORMAL, size, 0)) * 16777216.0  # 2^24
        whole = units.to(tl.int32)
        smaller = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8 < units - whole.to(tl.float32)
        subnormal = (whole + smaller.to(tl.int32)).to(tl.uint32)
        finite = tl.where(size < HALF_NORMAL, subnormal, normal)
        return (((word >> 16) & 0x8000) | tl.where(size > INFINITY, 0x7E00, finite)).to(tl.uint16)


@triton.jit
def displacement(x, x0, delta, TYPE: tl.constexpr):
    """The displacement of an x that is stored rounded: `delta`, unless somebody else has written x since."""
    return tl.where(widen(nearest(x0 + delta, TYPE), TYPE) == x, delta, x - x0)


# -- memory ------------------------------------------------------------------------------------------------------------


@triton.jit
def array(address, begin, TYPE: tl.constexpr, FULL: tl.constexpr):
    """A pointer to the element `begin` of the array at an address; FULL: known to be a multiple of 16 bytes."""
    if TYPE.primitive_bitwidth == 16:
        pointer = address.to(tl.pointer_type(tl.uint16)) + begin
    else:
        pointer = address.to(tl.pointer_type(TYPE)) + begin
    return tl.multiple_of(pointer, 16) if FULL else pointer


@triton.jit
def load(pointers, mask, TYPE: tl.constexpr):
    """Elements of an array of any type, 0 where they are masked out."""
    if TYPE.primitive_bitwidth == 16:
        return widen(tl.load(pointers, mask, 0), TYPE)
    else:
        return tl.load(pointers, mask, 0.0)


@triton.jit
def store(pointers, value, mask, TYPE: tl.constexpr, by_chance=False, random=0):
    """Elements of an array of any type; those of 16 bits rounded, to nearest or by_chance: with these random bits."""
    if TYPE.primitive_bitwidth == 16:
        rounded = stochastic(value, random, TYPE) if by_chance else nearest(value, TYPE)
        tl.store(pointers, rounded, mask)
    else:
        tl.store(pointers, value, mask)
