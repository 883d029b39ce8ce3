"""The two kernels of a step: how all chunks of all tensors are walked. The mathematics is in rule.py.

Constants: T is the type of the arithmetic, X that of x and x0, S that of m, v and s; delta is float32. Gradients have
the type X or, where that has 16 bits, each for itself the type X or float32.

*update* makes m, v, s, and x with the old d, in one pass, and gathers the sums; *finish* derives d_new from them and
brings x to where the reference has it. Both are persistent: some programs walk the chunks of all tensors.

Note [The number of programs is not in the result]
A chunk's sums go to its own place in `partials`, whichever program took it, and one program adds them up, in a way
that does not depend on their order. So neither the size of the device nor the order of programs is in the bits.
"""

import triton
import triton.language as tl

from .rule import (
    CORRECT,
    NOTHING,
    STEP,
    accumulate,
    advance,
    coefficients,
    correct,
    finish_of,
    finite_or_zero,
    gradient,
    moments,
    sample,
    step,
    undo,
    without_step,
)
from .storage import (
    CORRECTION_STREAM,
    STEP_STREAM,
    array,
    displacement,
    draw,
    exchanged,
    load,
    random_bits,
    store,
)
from .tables import (
    ORDER,
    STRIDES,
    TENSOR_WORDS,
    load_estimate,
    load_grad,
    load_hyper,
    load_shared,
    load_tensor,
    store_estimate,
)

# -- the elements of a chunk -------------------------------------------------------------------------------------------


@triton.jit
def is_full(t, grad, begin, CHUNK: tl.constexpr):
    """Whether a chunk has all its elements, and all arrays that are walked with one index start at 16 bytes."""
    addresses = t.x | grad.at | t.m | t.v | t.delta | tl.where(t.slice_p == 1, t.s | t.x0, 0)
    return (begin + CHUNK <= t.numel) & (addresses % 16 == 0)


@triton.jit
def inside(i, size, FULL: tl.constexpr):
    """Which elements of a block are there. FULL: all, so that no mask is in the way of 16-byte accesses."""
    return tl.full(i.shape, True, tl.int1) if FULL else i < size


@triton.jit
def where_also(condition, here):
    """`here` if a condition of all elements holds, else nowhere."""
    return tl.where(condition, here, False)


@triton.jit
def sampled_at(order, t, begin, i, CHUNK: tl.constexpr):
    """Whether the element at memory position begin + i is one of the row-major 0, p, 2p, ..., and its place in s."""
    if t.dims == 0:
        first_sample = (begin + t.slice_p - 1) // t.slice_p
        # Within the chunk, so that 32 bits do: 64-bit divisions would cost more than the memory. Beyond the chunk any
        # number says the same: no sample, or no second one.
        behind = i - tl.minimum(first_sample * t.slice_p - begin, CHUNK).to(tl.int32)
        period = tl.minimum(t.slice_p, CHUNK).to(tl.int32)
        taken = (behind >= 0) & (behind % period == 0)
        index = first_sample + behind // period
    else:
        left = begin + i
        position = left * 0
        for k in tl.range(0, t.dims):
            stride = tl.load(order + k)
            position += left // stride * tl.load(order + STRIDES + k)
            left = left % stride
        taken = position % t.slice_p == 0
        index = position // t.slice_p
    return taken, index


# -- the two passes over a chunk ---------------------------------------------------------------------------------------


@triton.jit
def load_gradient(grad, begin, i, here, X: tl.constexpr, FULL: tl.constexpr):
    """In the type X, or in float32 where X has 16 bits."""
    if X.primitive_bitwidth == 16:
        if grad.bits == 32:
            value = load(array(grad.at, begin, tl.float32, FULL) + i, here, tl.float32)
        else:
            value = load(array(grad.at, begin, X, FULL) + i, here, X)
        return value
    else:
        return load(array(grad.at, begin, X, FULL) + i, here, X)


@triton.jit
def position(x, x0, delta, displaced, X: tl.constexpr):
    """x in the precision of the arithmetic; what moves of it, and the rest, see Note [Position] of rule.py; x0 - x."""
    if X.primitive_bitwidth != 16:
        return x, x, tl.zeros_like(x), x0 - x
    else:
        at, origin, distance = x, tl.zeros_like(x), x0 - x
        if displaced:
            at, origin = displacement(x, x0, delta, X), x0
            x, distance = origin + at, -at
        return x, at, origin, distance


@triton.jit
def store_position(x, delta, at, origin, mask, t, displaced, random, X: tl.constexpr):
    """x, and delta where there is one."""
    if X.primitive_bitwidth == 16:
        tl.store(delta, at, where_also(displaced, mask))
        at = tl.where(displaced, origin + at, at)
    store(x, at, mask, X, t.stochastic, random)


@triton.jit
def update_walk(
    order, t, grad, begin, c, T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """m, v, s and x of a chunk, x with the old d; returns each lane's part of sum <g, x0 - x> and sum |s|."""
    x, delta = array(t.x, begin, X, FULL), array(t.delta, begin, tl.float32, FULL)
    m, v = array(t.m, begin, S, FULL), array(t.v, begin, S, FULL)
    s = array(t.s, 0 if SAMPLED else begin, S, FULL and not SAMPLED)
    x0 = array(t.x0, 0 if SAMPLED else begin, X, FULL and not SAMPLED)
    displaced = t.delta != 0
    decay, dlr = without_step(c.decay, c), without_step(c.dlr, c)
    random = random_bits(c.k, t.index, STEP_STREAM, begin)
    dot = tl.zeros([BLOCK], T)
    norm = tl.zeros([BLOCK], T)
    size = tl.minimum(t.numel - begin, CHUNK).to(tl.int32)
    for first in tl.range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = inside(i, size, FULL)
        taken, index = here, i
        if SAMPLED:
            taken, index = sampled_at(order, t, begin, i, CHUNK)
            taken = taken & here
        kept = where_also(c.momentum, here)  # without momentum m is not kept, and x waits
        old_x = load(x + i, here, X)
        old_v = load(v + i, here, S)
        old_m = load(m + i, kept, S)
        old_s = load(s + index, taken, S)
        start = load(x0 + index, where_also(t.x0 != 0, taken), X)
        old_delta = tl.load(delta + i, where_also(displaced, here), 0.0)
        grads = load_gradient(grad, begin, i, here, X, FULL)

        old_x, at, origin, distance = position(old_x, start, old_delta, displaced, X)
        g = gradient(grads, old_x, c)
        new_s, my_dot, my_norm = sample(g, distance, old_s, c)
        dot += tl.where(taken, my_dot, 0.0)
        norm += tl.where(taken, my_norm, 0.0)
        new_m, new_v = moments(g, old_m, old_v, c)
        at = step(at, old_x, new_m, new_v, decay, dlr, c.d_eps)
        bits = draw(random, (begin + i).to(tl.uint32))
        store(s + index, new_s, taken, S)
        store(v + i, new_v, here, S, True, exchanged(bits))
        store(m + i, new_m, kept, S)
        store_position(x + i, delta + i, at, origin, kept, t, displaced, bits, X)
    return dot, norm


@triton.jit
def update_chunk(
    order, t, grad, begin, c, T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The chunk's part of lr*bc * sum <g, x0 - x> and of sum |s|, in float64; which lane has which element is fixed."""
    full = is_full(t, grad, begin, CHUNK)
    if t.slice_p == 1:
        if full:
            dot, norm = update_walk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, True, False)
        else:
            dot, norm = update_walk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, False, False)
    else:
        if full:
            dot, norm = update_walk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, True, True)
        else:
            dot, norm = update_walk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK, False, True)
    return tl.sum(dot.to(tl.float64)) * c.dot_weight, tl.sum(norm.to(tl.float64))


@triton.jit
def finish_walk(
    t, grad, begin, c, how, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """x of a chunk: the step that was deferred, the correction, or the step taken back."""
    x, delta = array(t.x, begin, X, FULL), array(t.delta, begin, tl.float32, FULL)
    m, v, x0 = array(t.m, begin, S, FULL), array(t.v, begin, S, FULL), array(t.x0, begin, X, FULL)
    displaced = t.delta != 0
    random = random_bits(c.k, t.index, tl.where(how == STEP, STEP_STREAM, CORRECTION_STREAM), begin)
    size = tl.minimum(t.numel - begin, CHUNK).to(tl.int32)
    for first in tl.range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = inside(i, size, FULL)
        old_x = load(x + i, here, X)
        new_v = load(v + i, here, S)
        start = load(x0 + i, where_also(displaced & (t.x0 != 0), here), X)
        old_delta = tl.load(delta + i, where_also(displaced, here), 0.0)
        new_m = load(m + i, here, S) if c.momentum else load_gradient(grad, begin, i, here, X, FULL)

        old_x, at, origin, _ = position(old_x, start, old_delta, displaced, X)
        if how == STEP:
            if not c.momentum:
                new_m = c.d_new * finite_or_zero(gradient(new_m, old_x, c))
            at = step(at, old_x, new_m, new_v, c.decay, c.dlr, c.d_eps)
        elif how == CORRECT:
            at = correct(at, new_m, new_v, c)
        else:
            at = undo(at, origin, new_m, new_v, c)
        bits = draw(random, (begin + i).to(tl.uint32))
        store_position(x + i, delta + i, at, origin, here, t, displaced, bits, X)


# -- the kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def is_last_program(arrived):
    """Whether all other programs of the launch have come here before; this one then sees what they wrote."""
    tl.debug_barrier()  # all threads of this program are through with what they read and wrote
    return tl.atomic_add(arrived, 1) == tl.num_programs(0) - 1


@triton.jit
def total(partials, count, LANES: tl.constexpr):
    """The sum of all partial sums."""
    sums = tl.zeros([LANES], tl.float64)
    errors = tl.zeros([LANES], tl.float64)
    for first in tl.range(0, count, LANES):
        n = first + tl.arange(0, LANES)
        # Past the first-level cache, which does not see the writes of other multiprocessors.
        part = tl.load(partials + n, n < count, 0.0, cache_modifier=".cg")
        sums, errors = accumulate(sums, errors, part, 0.0)
    whole, error = tl.reduce((sums, errors), 0, accumulate)
    return whole + error


@triton.jit(do_not_specialize=["chunk_count"])
def prodigy_update_kernel(
    tensors, owners, row, sums, counters, partials, chunk_count, shared, groups, grads, found_inf,
    T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """m, v, s, x with the old d in d*eps; sums = (sum lr*bc*<g, x0 - x>, sum |s|).

    Chunk n belongs to tensor owners[n]. A found_inf that is not zero means: no step.
    counters = (programs that are through, whether some x waits for the second kernel).
    """
    if tl.load(found_inf) != 0:
        return
    old, common = load_estimate(row), load_shared(shared)
    current = tl.load(tensors) * 0
    c = coefficients(load_hyper(groups, current), common, old, old.d, T)
    for n in tl.range(tl.program_id(0), chunk_count, tl.num_programs(0)):
        owner = tl.load(owners + n)
        t = load_tensor(tensors, owner)
        grad = load_grad(grads, owner)
        if t.group != current:
            current = t.group
            c = coefficients(load_hyper(groups, current), common, old, old.d, T)
        dot = tl.zeros([], tl.float64)
        norm = tl.zeros([], tl.float64)
        if (grad.at != 0) & c.active:
            begin = (n - t.first_chunk) * CHUNK
            order = tensors + owner * TENSOR_WORDS + ORDER
            dot, norm = update_chunk(order, t, grad, begin, c, T, X, S, CHUNK, BLOCK)
            if c.deferred:
                tl.store(counters + 1, 1)
        tl.store(partials + n, dot)
        tl.store(partials + chunk_count + n, norm)
    if is_last_program(counters):
        tl.store(counters, 0)
        tl.store(sums, total(partials, chunk_count, LANES))
        tl.store(sums + 1, total(partials + chunk_count, chunk_count, LANES))


@triton.jit(do_not_specialize=["last", "chunk_count"])
def prodigy_finish_kernel(
    tensors, owners, row, sums, counters, last, chunk_count, shared, groups, grads, found_inf,
    T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_new of the sums; x as it would be had the first kernel known d_new. last != 0: the estimate is written, too."""
    if tl.load(found_inf) != 0:
        return
    # Every program derives the same estimate. The last to have read the old one overwrites it.
    old, common = load_estimate(row), load_shared(shared)
    now, stepped = advance(old, tl.load(sums), tl.load(sums + 1), common)
    moved = now.d != old.d
    if moved | ~stepped | (tl.load(counters + 1) != 0):
        current = tl.load(tensors) * 0
        c = coefficients(load_hyper(groups, current), common, old, now.d, T)
        for n in tl.range(tl.program_id(0), chunk_count, tl.num_programs(0)):
            owner = tl.load(owners + n)
            t = load_tensor(tensors, owner)
            grad = load_grad(grads, owner)
            if t.group != current:
                current = t.group
                c = coefficients(load_hyper(groups, current), common, old, now.d, T)
            how = finish_of(c.deferred, stepped, moved)
            if (grad.at != 0) & c.active & (how != NOTHING):
                begin = (n - t.first_chunk) * CHUNK
                if is_full(t, grad, begin, CHUNK):
                    finish_walk(t, grad, begin, c, how, X, S, CHUNK, BLOCK, True)
                else:
                    finish_walk(t, grad, begin, c, how, X, S, CHUNK, BLOCK, False)
    if is_last_program(counters):
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
        if last != 0:
            store_estimate(row, now)
