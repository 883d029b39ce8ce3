"""The two kernels of a step, which walk all chunks of all tensors (walk.py).

*update* computes m, v, s, and x with the old d, in one pass, and gathers the sums; *finish* derives d_new from them and
gives x the reference's value. Both are persistent: some programs share the chunks of all tensors.

Note [The number of programs is not in the result]
A chunk's sums go to its own place in `partials`, whichever program has taken it, and one program adds them up in a way
that does not depend on their order. So the result depends neither on the number of programs nor on their order.
"""

import triton
import triton.language as tl

from .rule import NOTHING, accumulate, advance, coefficients, finish_of
from .tables import (
    load_estimate,
    load_found_inf,
    load_grad_scale,
    load_gradient,
    load_hyper,
    load_options,
    load_tensor,
    order_of,
    store_estimate,
)
from .walk import finish_chunk, update_chunk


@triton.jit
def next_chunk(
    n, tensors, owners, groups, grads, group, c, options, old, d_new, grad_scale, T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Returns chunk n's first element, its tensor with order and gradient, and the coefficients of the tensor's group.

    group, c: the group of the chunk before and its coefficients, which are computed anew only if the group is another.
    """
    owner = tl.load(owners + n)
    t = load_tensor(tensors, owner)
    if t.group != group:
        c = coefficients(load_hyper(groups, t.group), options, old, d_new, grad_scale, T)
    return (n - t.first_chunk) * CHUNK, t, order_of(tensors, owner), load_gradient(grads, owner), c


@triton.jit
def is_last_program(arrived):
    """Returns whether this is the last program of the launch to arrive; it then sees all the others' writes."""
    tl.debug_barrier()  # all threads of this program have finished their loads and stores
    return tl.atomic_add(arrived, 1) == tl.num_programs(0) - 1


@triton.jit
def total(partials, count, LANES: tl.constexpr):
    """Returns the sum of all partial sums, which does not depend on their order."""
    sums = tl.zeros([LANES], tl.float64)
    errors = tl.zeros([LANES], tl.float64)
    for first in tl.range(0, count, LANES):
        n = first + tl.arange(0, LANES)
        # ".cg" bypasses the L1 cache, which is not coherent across multiprocessors.
        part = tl.load(partials + n, n < count, 0.0, cache_modifier=".cg")
        sums, errors = accumulate(sums, errors, part, 0.0)
    sums, errors = tl.reduce((sums, errors), 0, accumulate)
    return sums + errors


@triton.jit(do_not_specialize=["chunk_count"])
def prodigy_update_kernel(
    tensors, owners, row, sums, counters, partials, chunk_count, record, groups, grads,
    T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """m, v, s, x with the old d in d*eps; sums = (sum lr*bc*<g, x0 - x>, sum |s|). Nothing if found_inf is not zero.

    Args:
        tensors, groups, grads: rows of tables.py, one per tensor, group, tensor.
        owners: for every chunk, the index of its tensor.
        row, record: the estimate, and the STEP words of the step's record.
        counters: the number of programs that have finished, 0 between launches; whether some x waits for *finish*.
        partials: each chunk's dot, then each chunk's norm.
    """
    if load_found_inf(record) != 0:
        return
    old, options, grad_scale = load_estimate(row), load_options(record), load_grad_scale(record)
    group = tl.load(tensors) * 0
    c = coefficients(load_hyper(groups, group), options, old, old.d, grad_scale, T)
    for n in tl.range(tl.program_id(0), chunk_count, tl.num_programs(0)):
        begin, t, order, grad, c = next_chunk(
            n, tensors, owners, groups, grads, group, c, options, old, old.d, grad_scale, T, CHUNK
        )
        group = t.group
        dot = tl.zeros([], tl.float64)
        norm = tl.zeros([], tl.float64)
        if (grad.address != 0) & c.active:
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
    tensors, owners, row, sums, counters, last, chunk_count, record, groups, grads,
    T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_new from the sums; x as it would be had *update* known d_new. Nothing if found_inf is not zero.

    Args:
        last: not 0: the new estimate is written, too. For the others, see `prodigy_update_kernel`.
    """
    if load_found_inf(record) != 0:
        return
    # Every program derives the same estimate. The last to have read the old one overwrites it.
    old, options, grad_scale = load_estimate(row), load_options(record), load_grad_scale(record)
    new, stepped = advance(old, tl.load(sums), tl.load(sums + 1), options)
    changed = new.d != old.d
    if changed | ~stepped | (tl.load(counters + 1) != 0):
        group = tl.load(tensors) * 0
        c = coefficients(load_hyper(groups, group), options, old, new.d, grad_scale, T)
        for n in tl.range(tl.program_id(0), chunk_count, tl.num_programs(0)):
            begin, t, _, grad, c = next_chunk(
                n, tensors, owners, groups, grads, group, c, options, old, new.d, grad_scale, T, CHUNK
            )
            group = t.group
            how = finish_of(c.deferred, stepped, changed)
            if (grad.address != 0) & c.active & (how != NOTHING):
                finish_chunk(t, grad, begin, c, how, X, S, CHUNK, BLOCK)
    if is_last_program(counters):
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
        if last != 0:
            store_estimate(row, new)
