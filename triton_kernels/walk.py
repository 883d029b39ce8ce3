"""How one program walks one chunk: loads a block of elements, applies the rule, stores them. The rule is in rule.py.

Constants: see elements.py. ROUNDS: whether anything is rounded stochastically.

Note [Whole eights]
Eight elements share a hash, and a thread that has all of an eight, or half of it, computes one. In some shards a chunk
begins within an eight of the whole tensor: there the walk begins with that eight, as many elements before the chunk's
own as `lead` says, and masks those.
"""

import triton
import triton.language as tl

from .elements import (
    ALL,
    DISPLACED,
    block_of,
    load_grads,
    load_x,
    masked,
    position_of,
    size_of,
    store_position,
)
from .rounding import array, draw, load, second, store, third
from .rule import (
    CORRECT,
    STEP,
    correct,
    finite_or_zero,
    gradient,
    moments,
    quotient,
    sample,
    square_root,
    step,
    step_by,
    undo,
    without_step,
)

THREADS = tl.constexpr(128)  # of a program


@triton.jit
def fold(terms):
    """Returns the sums of neighbours."""
    left, right = tl.split(tl.reshape(terms, [terms.shape[0] // 2, 2]))
    return left + right


@triton.jit
def folded(terms):
    """Returns the sums of the neighbours that one thread has, in an order that does not depend on which it has."""
    if terms.shape[0] >= 8 * THREADS:
        terms = fold(terms)
    if terms.shape[0] >= 4 * THREADS:
        terms = fold(terms)
    if terms.shape[0] >= 2 * THREADS:
        terms = fold(terms)
    return terms


@triton.jit
def sums_of(dot, norm):
    """Returns the sums of all lanes, in float64. Which lane has which element is fixed, so they are always the same."""
    return tl.sum(dot.to(tl.float64)), tl.sum(norm.to(tl.float64))


@triton.jit
def update_walk(
    t, grad, random, begin, c, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates m, v and x of a chunk, x with the old d, and s where all elements are samples.

    Returns sum <g, x0 - x> and sum |s| in float64; 0 if not all elements are samples.
    """
    ROUNDS: tl.constexpr = (X.primitive_bitwidth == 16 and KEPT != DISPLACED) or S.primitive_bitwidth == 16
    size = size_of(t, begin, CHUNK, ALIGNED)
    lead = 0 if ALIGNED or not ROUNDS else random.lead
    begin -= lead  # see Note [Whole eights]
    x, m, v = array(t.x, begin, X, ALIGNED), array(t.m, begin, S, ALIGNED), array(t.v, begin, S, ALIGNED)
    s, x0 = array(t.s, begin, S, ALIGNED), array(t.x0, begin, X, ALIGNED)
    delta, low = array(t.delta, begin, tl.float32, ALIGNED), array(t.low, begin, tl.int8, ALIGNED)
    decay, dlr = without_step(c.decay, c), without_step(c.dlr, c)
    dot = tl.zeros([THREADS], c.d.dtype)
    norm = tl.zeros([THREADS], c.d.dtype)
    for first in tl.range(0, lead + size, BLOCK):
        i, mask = block_of(first, lead, size, BLOCK, ALIGNED)
        with_momentum = masked(c.momentum, mask)  # without momentum there is no m, and x waits for *finish*
        old_x = load_x(x + i, low + i, mask, X, KEPT)
        old_v = load(v + i, mask, S)
        old_m = load(m + i, with_momentum, S)
        old_s = load(s + i, mask, S) if SAMPLES == ALL else 0.0
        old_x0 = load(x0 + i, masked(t.x0 != 0, mask), X) if SAMPLES == ALL or KEPT == DISPLACED else old_x
        old_delta = tl.load(delta + i, mask, 0.0) if KEPT == DISPLACED else 0.0
        grads = load_grads(grad, begin, i, mask, X, G, ALIGNED)

        old_x, position, origin, distance = position_of(old_x, old_x0, old_delta, X, KEPT)
        g = gradient(grads, old_x, c)
        bits = draw(random, i) if ROUNDS else 0
        if SAMPLES == ALL:
            new_s, dot_terms, norm_terms = sample(g, distance, old_s, c)
            dot += folded(dot_terms)  # 0 where it is masked
            norm += folded(norm_terms)
            store(s + i, new_s, mask, S, True, third(bits) if S.primitive_bitwidth == 16 else 0)
        new_m, new_v = moments(g, old_m, old_v, c)
        position = step_by(quotient(new_m, new_v, c.d_eps, S), position, old_x, decay, dlr)
        store(v + i, new_v, mask, S, True, second(bits) if S.primitive_bitwidth == 16 else 0)
        store(m + i, new_m, with_momentum, S)
        store_position(x + i, delta + i, low + i, position, origin, with_momentum, t, bits, X, KEPT)
    if SAMPLES == ALL:
        return sums_of(dot, norm)
    else:
        return tl.zeros([], tl.float64), tl.zeros([], tl.float64)


@triton.jit
def finish_walk(
    t, grad, random, begin, c, how, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Moves x of a chunk: `how` is STEP, the step that was deferred; CORRECT; or UNDO, the step taken back."""
    ROUNDS: tl.constexpr = X.primitive_bitwidth == 16 and KEPT != DISPLACED
    size = size_of(t, begin, CHUNK, ALIGNED)
    lead = 0 if ALIGNED or not ROUNDS else random.lead
    begin -= lead  # see Note [Whole eights]
    x, m, v = array(t.x, begin, X, ALIGNED), array(t.m, begin, S, ALIGNED), array(t.v, begin, S, ALIGNED)
    x0, delta = array(t.x0, begin, X, ALIGNED), array(t.delta, begin, tl.float32, ALIGNED)
    low = array(t.low, begin, tl.int8, ALIGNED)
    for first in tl.range(0, lead + size, BLOCK):
        i, mask = block_of(first, lead, size, BLOCK, ALIGNED)
        old_x = load_x(x + i, low + i, mask, X, KEPT)
        new_v = load(v + i, mask, S)
        old_x0 = load(x0 + i, masked(t.x0 != 0, mask), X) if KEPT == DISPLACED else old_x
        old_delta = tl.load(delta + i, mask, 0.0) if KEPT == DISPLACED else 0.0
        # Without momentum m is d_new*g, and `new_m` is first the gradient.
        new_m = load(m + i, mask, S) if c.momentum else load_grads(grad, begin, i, mask, X, G, ALIGNED)

        old_x, position, origin, _ = position_of(old_x, old_x0, old_delta, X, KEPT)
        if how == STEP:
            if not c.momentum:
                new_m = c.d_new * finite_or_zero(gradient(new_m, old_x, c))
            position = step(position, old_x, new_m, square_root(new_v), c.decay, c.dlr, c.d_eps)
        elif how == CORRECT:
            position = correct(position, new_m, square_root(new_v), c)
        else:
            position = undo(position, origin, new_m, square_root(new_v), c)
        bits = draw(random, i) if ROUNDS else 0
        store_position(x + i, delta + i, low + i, position, origin, mask, t, bits, X, KEPT)
