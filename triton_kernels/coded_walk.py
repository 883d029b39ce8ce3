"""How one program walks one chunk whose state is in 8 bits, see Note [8 bits] of prodigy_fused/eight_bits.py.

m and v are rounded before x takes its step, which is made of the numbers that are stored; x - x0 after it, for it
changes by what the stored x does. Codes are those of other backends, but where these compute a float32 in another order
and it is rounded to the other side of a limit.

A program writes the codes and the scale of a block when all its threads have read the old ones, for the largest number
of the block depends on all of them.

Constants: see elements.py.
"""

import triton
import triton.language as tl

from .codes import (
    DELTA,
    ROOT,
    S_CODE,
    M,
    code_array,
    load_codes,
    places,
    places_if,
    scale_array,
    store_codes,
)
from .elements import ALL, load_grads, load_x, size_of, store_x
from .rounding import array, draw, third
from .rule import (
    CORRECT,
    STEP,
    correct,
    finite_or_zero,
    gradient,
    moments,
    sample,
    step,
    step_by,
    undo,
    without_step,
)
from .walk import THREADS, folded, sums_of


@triton.jit
def folded_parts(terms):
    """Returns the sums of the elements that one thread has, see `folded`."""
    terms = tl.sum(terms, 0)
    return folded(tl.reshape(terms, [terms.shape[0] * terms.shape[1]]))


@triton.jit
def update_coded_walk(
    t, grad, random, begin, c, X: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr, KEPT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """As `update_walk`; random: of this tensor's own indices."""
    size = size_of(t, begin, CHUNK, ALIGNED)
    x, low = array(t.x, begin, X, ALIGNED), array(t.low, begin, tl.int8, ALIGNED)
    m, v, scale = code_array(t.m, begin, M, ALIGNED), code_array(t.v, begin, ROOT, ALIGNED), scale_array(t.scale, begin)
    s, delta = code_array(t.s, begin, S_CODE, ALIGNED), code_array(t.delta, begin, DELTA, ALIGNED)
    decay, dlr = without_step(c.decay, c), without_step(c.dlr, c)
    dot = tl.zeros([THREADS], c.d.dtype)
    norm = tl.zeros([THREADS], c.d.dtype)
    for first in tl.range(0, size, BLOCK):
        at = places(first, size, X, BLOCK)
        with_momentum = places_if(c.momentum, at)  # without momentum there is no m, and x waits for *finish*
        old_x = load_x(x + at.i, low + at.i, at.mask, X, KEPT)
        old_m = load_codes(m, scale, with_momentum, M)
        old_root = load_codes(v, scale, at, ROOT)
        grads = load_grads(grad, begin, at.i, at.mask, X, G, ALIGNED)

        g = gradient(grads, old_x, c)
        bits = draw(random, at.i)
        if SAMPLES == ALL:
            old_s, old_delta = load_codes(s, scale, at, S_CODE), load_codes(delta, scale, at, DELTA)
            new_s, dot_terms, norm_terms = sample(g, -old_delta, old_s, c)
            dot += folded_parts(dot_terms)  # 0 where it is masked
            norm += folded_parts(norm_terms)
            store_codes(s, scale, new_s, third(bits), at, S_CODE)
        new_m, new_v = moments(g, old_m, old_root * old_root, c)
        # Roots and quotients that are off by a few units in the last place, as codes are off by many.
        root = store_codes(v, scale, tl.sqrt(new_v), bits, at, ROOT)
        new_m = store_codes(m, scale, new_m, 0, with_momentum, M)
        new_x = step_by(new_m / (root + c.d_eps), old_x, old_x, decay, dlr)
        new_x = store_x(x + at.i, low + at.i, new_x, with_momentum.mask, t, bits, X, KEPT)
        if SAMPLES == ALL:
            store_codes(delta, scale, old_delta + finite_or_zero(new_x - old_x), third(bits), with_momentum, DELTA)
    if SAMPLES == ALL:
        return sums_of(dot, norm)
    else:
        return tl.zeros([], tl.float64), tl.zeros([], tl.float64)


@triton.jit
def finish_coded_walk(
    t, grad, random, begin, c, how, X: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr, KEPT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """As `finish_walk`."""
    size = size_of(t, begin, CHUNK, ALIGNED)
    x, low = array(t.x, begin, X, ALIGNED), array(t.low, begin, tl.int8, ALIGNED)
    m, v, scale = code_array(t.m, begin, M, ALIGNED), code_array(t.v, begin, ROOT, ALIGNED), scale_array(t.scale, begin)
    delta = code_array(t.delta, begin, DELTA, ALIGNED)
    for first in tl.range(0, size, BLOCK):
        at = places(first, size, X, BLOCK)
        old_x = load_x(x + at.i, low + at.i, at.mask, X, KEPT)
        root = load_codes(v, scale, at, ROOT)
        # Without momentum m is d_new*g, and `new_m` is first the gradient.
        new_m = load_codes(m, scale, at, M) if c.momentum else load_grads(grad, begin, at.i, at.mask, X, G, ALIGNED)

        if how == STEP:
            if not c.momentum:
                new_m = c.d_new * finite_or_zero(gradient(new_m, old_x, c))
            new_x = step(old_x, old_x, new_m, root, c.decay, c.dlr, c.d_eps)
        elif how == CORRECT:
            new_x = correct(old_x, new_m, root, c)
        else:
            new_x = undo(old_x, tl.zeros_like(old_x), new_m, root, c)
        bits = draw(random, at.i)
        new_x = store_x(x + at.i, low + at.i, new_x, at.mask, t, bits, X, KEPT)
        if SAMPLES == ALL:
            old_delta = load_codes(delta, scale, at, DELTA)
            store_codes(delta, scale, old_delta + finite_or_zero(new_x - old_x), third(bits), at, DELTA)
