"""How one program walks one chunk: loads a block of elements, applies the rule, stores them. The rule is in rule.py.

Constants: T is the type of the arithmetic, X that of x and x0, S that of m, v and s; delta is float32. If X has 16
bits, each gradient is of the type X or of float32; else all are of the type X. FULL: see `is_full`. SAMPLES: which
elements are samples, that is, have an s and enter the sums.
"""

import triton
import triton.language as tl

from .rounding import (
    CORRECTION_STREAM,
    STEP_STREAM,
    array,
    displacement,
    draw,
    load,
    random_bits,
    second,
    store,
    third,
)
from .rule import (
    CORRECT,
    STEP,
    correct,
    finite_or_zero,
    gradient,
    moments,
    sample,
    step,
    undo,
    without_step,
)
from .tables import load_strides

# SAMPLES. None: the tensor's estimate is frozen.
NONE = tl.constexpr(0)
ALL = tl.constexpr(1)
SOME = tl.constexpr(2)  # slice_p > 1: s and x0 are packed

# -- which elements ----------------------------------------------------------------------------------------------------


@triton.jit
def is_full(t, grad, begin, CHUNK: tl.constexpr):
    """Returns whether a chunk has CHUNK elements and all arrays with its index start at a multiple of 16 bytes."""
    addresses = t.x | grad.address | t.m | t.v | t.delta | tl.where(t.slice_p == 1, t.s | t.x0, 0)
    return (begin + CHUNK <= t.numel) & (addresses % 16 == 0)


@triton.jit
def inside(i, size, FULL: tl.constexpr):
    """Returns a mask of the elements below `size`. FULL: a constant one, which 16-byte accesses need."""
    return tl.full(i.shape, True, tl.int1) if FULL else i < size


@triton.jit
def masked(condition, mask):
    """Returns `mask` if a condition common to all elements holds, else a mask of no element."""
    return tl.where(condition, mask, False)


@triton.jit
def find_samples(order, t, begin, i, CHUNK: tl.constexpr):
    """Returns whether elements are samples, at row-major positions 0, p, 2p, ..., and their index among the samples.

    i: the elements' positions in the chunk. order: the tensor's strides.
    """
    if t.dims == 0:
        first_sample = (begin + t.slice_p - 1) // t.slice_p
        # 32-bit offsets within the chunk: 64-bit divisions would cost more time than the memory. So both are clamped to
        # the chunk's size: a larger distance means no sample here, a larger period no second one.
        offset = i - tl.minimum(first_sample * t.slice_p - begin, CHUNK).to(tl.int32)
        period = tl.minimum(t.slice_p, CHUNK).to(tl.int32)
        is_sample = (offset >= 0) & (offset % period == 0)
        index = first_sample + offset // period
    else:
        rest = begin + i
        row_major = rest * 0
        for k in tl.range(0, t.dims):
            stride, row_major_stride = load_strides(order, k)
            row_major += rest // stride * row_major_stride
            rest = rest % stride
        is_sample = row_major % t.slice_p == 0
        index = row_major // t.slice_p
    return is_sample, index


# -- their values ------------------------------------------------------------------------------------------------------


@triton.jit
def load_grads(grad, begin, i, mask, X: tl.constexpr, FULL: tl.constexpr):
    """Returns elements of a gradient, in the type of the arithmetic."""
    if X.primitive_bitwidth == 16:
        if grad.bits == 32:
            value = load(array(grad.address, begin, tl.float32, FULL) + i, mask, tl.float32)
        else:
            value = load(array(grad.address, begin, X, FULL) + i, mask, X)
        return value
    else:
        return load(array(grad.address, begin, X, FULL) + i, mask, X)


@triton.jit
def position_of(x, x0, delta, displaced, X: tl.constexpr):
    """Returns x in the type of the arithmetic, its position and origin (Note [Position] of rule.py), and x0 - x."""
    if X.primitive_bitwidth != 16:
        return x, x, tl.zeros_like(x), x0 - x
    else:
        position, origin, distance = x, tl.zeros_like(x), x0 - x
        if displaced:
            position, origin = displacement(x, x0, delta, X), x0
            x, distance = origin + position, -position
        return x, position, origin, distance


@triton.jit
def store_position(x, delta, position, origin, mask, t, displaced, random, X: tl.constexpr):
    """Writes a position to x, and to delta where there is one."""
    if X.primitive_bitwidth == 16:
        tl.store(delta, position, masked(displaced, mask))
        position = tl.where(displaced, origin + position, position)
    store(x, position, mask, X, t.stochastic, random)


# -- the two passes over a chunk ---------------------------------------------------------------------------------------


@triton.jit
def update_walk(
    order, t, grad, begin, c, T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Updates m, v, s and x of a chunk, x with the old d.

    Returns each lane's part of sum <g, x0 - x> and of sum |s|, in the type T.
    """
    x, delta = array(t.x, begin, X, FULL), array(t.delta, begin, tl.float32, FULL)
    m, v = array(t.m, begin, S, FULL), array(t.v, begin, S, FULL)
    s = array(t.s, 0 if SAMPLES == SOME else begin, S, FULL and SAMPLES != SOME)
    x0 = array(t.x0, 0 if SAMPLES == SOME else begin, X, FULL and SAMPLES != SOME)
    displaced = t.delta != 0
    decay, dlr = without_step(c.decay, c), without_step(c.dlr, c)
    random = random_bits(c.k, t.index, STEP_STREAM, begin)
    dot = tl.zeros([BLOCK], T)
    norm = tl.zeros([BLOCK], T)
    size = tl.minimum(t.numel - begin, CHUNK).to(tl.int32)
    for first in tl.range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = inside(i, size, FULL)
        is_sample, index = mask, i
        if SAMPLES == SOME:
            is_sample, index = find_samples(order, t, begin, i, CHUNK)
            is_sample = is_sample & mask
        with_momentum = masked(c.momentum, mask)  # without momentum there is no m, and x waits for *finish*
        old_x = load(x + i, mask, X)
        old_v = load(v + i, mask, S)
        old_m = load(m + i, with_momentum, S)
        if SAMPLES != NONE:
            old_s = load(s + index, is_sample, S)
        old_x0 = load(x0 + index, masked(t.x0 != 0, is_sample), X)
        old_delta = tl.load(delta + i, masked(displaced, mask), 0.0)
        grads = load_grads(grad, begin, i, mask, X, FULL)

        old_x, position, origin, distance = position_of(old_x, old_x0, old_delta, displaced, X)
        g = gradient(grads, old_x, c)
        bits = draw(random, begin + i)
        if SAMPLES != NONE:
            new_s, dot_terms, norm_terms = sample(g, distance, old_s, c)
            dot += tl.where(is_sample, dot_terms, 0.0)
            norm += tl.where(is_sample, norm_terms, 0.0)
            store(s + index, new_s, is_sample, S, True, third(bits))
        new_m, new_v = moments(g, old_m, old_v, c)
        position = step(position, old_x, new_m, new_v, decay, dlr, c.d_eps)
        store(v + i, new_v, mask, S, True, second(bits))
        store(m + i, new_m, with_momentum, S)
        store_position(x + i, delta + i, position, origin, with_momentum, t, displaced, bits, X)
    return dot, norm


@triton.jit
def update_walk_of(
    order, t, grad, begin, c, T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Runs `update_walk` with the tensor's SAMPLES."""
    if t.s == 0:
        dot, norm = update_walk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, FULL, NONE)
    elif t.slice_p == 1:
        dot, norm = update_walk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, FULL, ALL)
    else:
        dot, norm = update_walk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, FULL, SOME)
    return dot, norm


@triton.jit
def update_chunk(
    order, t, grad, begin, c, T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates m, v, s and x of a chunk, x with the old d.

    Returns the chunk's part of lr*bc * sum <g, x0 - x> and of sum |s|, in float64. Which lane has which element is
    fixed, so they are always the same.
    """
    if is_full(t, grad, begin, CHUNK):
        dot, norm = update_walk_of(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, True)
    else:
        dot, norm = update_walk_of(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, False)
    return tl.sum(dot.to(tl.float64)) * c.dot_weight, tl.sum(norm.to(tl.float64))


@triton.jit
def finish_walk(
    t, grad, begin, c, how, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Moves x of a chunk: `how` is STEP, the step that was deferred; CORRECT; or UNDO, the step taken back."""
    x, delta = array(t.x, begin, X, FULL), array(t.delta, begin, tl.float32, FULL)
    m, v, x0 = array(t.m, begin, S, FULL), array(t.v, begin, S, FULL), array(t.x0, begin, X, FULL)
    displaced = t.delta != 0
    random = random_bits(c.k, t.index, tl.where(how == STEP, STEP_STREAM, CORRECTION_STREAM), begin)
    size = tl.minimum(t.numel - begin, CHUNK).to(tl.int32)
    for first in tl.range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = inside(i, size, FULL)
        old_x = load(x + i, mask, X)
        new_v = load(v + i, mask, S)
        old_x0 = load(x0 + i, masked(displaced & (t.x0 != 0), mask), X)
        old_delta = tl.load(delta + i, masked(displaced, mask), 0.0)
        # Without momentum m is d_new*g, and `new_m` is first the gradient.
        new_m = load(m + i, mask, S) if c.momentum else load_grads(grad, begin, i, mask, X, FULL)

        old_x, position, origin, _ = position_of(old_x, old_x0, old_delta, displaced, X)
        if how == STEP:
            if not c.momentum:
                new_m = c.d_new * finite_or_zero(gradient(new_m, old_x, c))
            position = step(position, old_x, new_m, new_v, c.decay, c.dlr, c.d_eps)
        elif how == CORRECT:
            position = correct(position, new_m, new_v, c)
        else:
            position = undo(position, origin, new_m, new_v, c)
        bits = draw(random, begin + i)
        store_position(x + i, delta + i, position, origin, mask, t, displaced, bits, X)


@triton.jit
def finish_chunk(
    t, grad, begin, c, how, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves x of a chunk, see `finish_walk`."""
    if is_full(t, grad, begin, CHUNK):
        finish_walk(t, grad, begin, c, how, X, S, CHUNK, BLOCK, True)
    else:
        finish_walk(t, grad, begin, c, how, X, S, CHUNK, BLOCK, False)
