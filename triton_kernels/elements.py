"""The elements of a chunk: which of them a block has, and how their values are loaded and stored.

Constants, the same for all tensors of a plan: X, the type of x and x0; G, that of the gradients, or None if each
gradient has X or float32; S, that of m, v and s, or uint8 where they are codes (codes.py); SAMPLES, which elements have
an s and enter the sums; KEPT, what the step moves. ALIGNED: see `is_aligned`.
"""

import triton
import triton.language as tl

from .rounding import array, displacement, kept_value, load, nearest, stochastic, stochastic_24, store, widen

# SAMPLES. None: the estimate is frozen.
NONE = tl.constexpr(0)
ALL = tl.constexpr(1)
SOME = tl.constexpr(2)  # slice_p > 1: s and x0 are packed
# KEPT.
AS_IT_IS = tl.constexpr(0)
DISPLACED = tl.constexpr(1)  # x is x0 + delta, rounded, and delta a float32
EXTENDED = tl.constexpr(2)  # x is a bfloat16, and low has 8 more of its bits


@triton.constexpr_function
def is_coded(S):
    """Returns whether m, v, and s unless it is of samples, are codes."""
    return tl.uint8 == S


@triton.jit
def is_aligned(t, grad, S: tl.constexpr, SAMPLES: tl.constexpr, KEPT: tl.constexpr):
    """Returns whether all arrays with a chunk's index start at a multiple of 16 bytes, and eight elements are whole.

    Of a shard they are whole in the whole tensor, too: so each eight share a hash.
    """
    addresses = t.x | grad.address | t.m | t.v
    if SAMPLES == ALL:
        addresses |= t.s | t.x0
    if KEPT == DISPLACED:
        addresses |= t.delta | t.x0
    if KEPT == EXTENDED:
        addresses |= t.low
    if is_coded(S):
        addresses |= t.delta
    return (addresses % 16 == 0) & ((t.numel | t.base) % 8 == 0)


@triton.jit
def size_of(t, begin, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the number of a chunk's elements. ALIGNED: known as a multiple of 8, which 16-byte accesses need."""
    size = tl.minimum(t.numel - begin, CHUNK).to(tl.int32)
    return tl.multiple_of(size, 8) if ALIGNED else size


@triton.jit
def block_of(first, lead, size, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the places of a block's elements in a walk, and which of them are the chunk's: `size`, from `lead` on.

    ALIGNED: lead is 0.
    """
    i = first + tl.arange(0, BLOCK)
    if ALIGNED:
        return i, i < size
    else:
        return i, (i >= lead) & (i < lead + size)


@triton.jit
def masked(condition, mask):
    """Returns `mask` if a condition common to all elements holds, else a mask of no element."""
    return tl.where(condition, mask, False)


@triton.jit
def load_grads(grad, begin, i, mask, X: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns elements of a gradient, in the type of the arithmetic."""
    if G is not None:
        return load(array(grad.address, begin, G, ALIGNED) + i, mask, G)
    else:
        if grad.bits == 32:
            value = load(array(grad.address, begin, tl.float32, ALIGNED) + i, mask, tl.float32)
        else:
            value = load(array(grad.address, begin, X, ALIGNED) + i, mask, X)
        return value


@triton.jit
def load_x(x, low, mask, X: tl.constexpr, KEPT: tl.constexpr):
    """Returns elements of x in the type of the arithmetic, with all the bits that are kept."""
    if KEPT == EXTENDED:
        return kept_value(tl.load(x, mask, 0), tl.load(low, mask, 0))
    else:
        return load(x, mask, X)


@triton.jit
def position_of(x, x0, delta, X: tl.constexpr, KEPT: tl.constexpr):
    """Returns x in the type of the arithmetic, its position and origin (Note [Position] of rule.py), and x0 - x.

    Where x is not displaced, the origin is 0, and may be any x0 as long as x0 - x is not used.
    """
    if KEPT == DISPLACED:
        position = displacement(x, x0, delta, X)
        return x0 + position, position, x0, -position
    else:
        return x, x, tl.zeros_like(x), x0 - x


@triton.jit
def store_x(x, low, value, mask, t, random, X: tl.constexpr, KEPT: tl.constexpr):
    """Writes x, and low where there is one; returns x as it is stored, with all the bits that are kept."""
    if KEPT == EXTENDED:
        new_x, new_low = stochastic_24(value, random)
        tl.store(x, new_x, mask)
        tl.store(low, new_low, mask)
        return kept_value(new_x, new_low)
    elif X.primitive_bitwidth == 16:
        rounded = stochastic(value, random, X) if t.stochastic else nearest(value, X)
        tl.store(x, rounded, mask)
        return widen(rounded, X)
    else:
        tl.store(x, value, mask)
        return value


@triton.jit
def store_position(x, delta, low, position, origin, mask, t, random, X: tl.constexpr, KEPT: tl.constexpr):
    """Writes a position to x, and to delta or low where there is one."""
    if KEPT == DISPLACED:
        tl.store(delta, position, mask)
        position = origin + position
        store(x, position, mask, X)
    elif KEPT == EXTENDED:
        store_x(x, low, position, mask, t, random, X, KEPT)
    else:
        store(x, position, mask, X, t.stochastic, random)
