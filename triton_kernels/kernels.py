"""The two kernels of a step, which walk all chunks of all tensors (chunk.py).

*update* computes m, v, s, and x with the old d, in one pass, and gathers the sums; *finish* derives d_new from them and
gives x the reference's value. Both are persistent: some programs share the chunks of all tensors.

Note [The number of programs is not in the result]
A chunk's sums go to its own place in `partials`, whichever program has taken it, and one program adds them up in a way
that does not depend on their order. So the result depends neither on the number of programs nor on their order.

Note [Several estimates]
All groups share one estimate, or each has its own. The chunks of an estimate are consecutive, and its sums are added by
their positions among these only. So each estimate has the bits that it would have in a plan of its tensors alone.
"""

import triton
import triton.language as tl

from . import elements  # noqa: F401, for the host
from .chunk import finish_chunk, update_chunk
from .estimate import accumulate, advance
from .rule import NOTHING, coefficients, finish_of
from .tables import (
    Gradient,
    load_estimate,
    load_estimate_index,
    load_found_inf,
    load_grad_scale,
    load_gradient,
    load_group,
    load_hyper,
    load_options,
    load_tensor,
    order_of,
    store_estimates,
)

ESTIMATES = tl.constexpr(128)  # that a program looks at at a time


@triton.jit
def load_owner(owners, n, chunk_count):
    """Returns the index of chunk n's tensor; 0 if there is no such chunk."""
    return tl.load(owners + n, n < chunk_count, 0)


@triton.jit
def is_last_program(arrived):
    """Returns whether this is the last program of the launch to arrive; it then sees all the others' writes."""
    tl.debug_barrier()  # all threads of this program have finished their loads and stores
    return tl.atomic_add(arrived, 1) == tl.num_programs(0) - 1


# -- update ------------------------------------------------------------------------------------------------------------


@triton.jit
def group_in_update(groups, row, group, grad_scale, T: tl.constexpr):
    """Returns a group's coefficients, with the old d in the place of d_new."""
    old = load_estimate(row, load_estimate_index(groups, group))
    return coefficients(load_hyper(groups, group), load_options(groups, group), old, old.d, grad_scale, T)


@triton.jit
def total(partials, begin, end, LANES: tl.constexpr):
    """Returns the sum of the partial sums from `begin` to `end`, which does not depend on their order."""
    sums = tl.zeros([LANES], tl.float64)
    errors = tl.zeros([LANES], tl.float64)
    for first in tl.range(begin, end, LANES):
        n = first + tl.arange(0, LANES)
        # ".cg" bypasses the L1 cache, which is not coherent across multiprocessors.
        part = tl.load(partials + n, n < end, 0.0, cache_modifier=".cg")
        sums, errors = accumulate(sums, errors, part, 0.0)
    sums, errors = tl.reduce((sums, errors), 0, accumulate)
    return sums + errors


@triton.jit(
    do_not_specialize=["begin", "end", "only", "only_bits", "adds_up", "chunk_count", "estimate_count"],
    do_not_specialize_on_alignment=["owners", "row", "sums", "ranges"],
)
def prodigy_update_kernel(
    tensors, owners, row, sums, counters, begin, end, only: tl.int64, only_bits: tl.int64, adds_up, partials,
    chunk_count, ranges, estimate_count, record, groups, grads,
    T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """m, v, s, x with the old d in d*eps; sums = (sum lr*bc*<g, x0 - x>, sum |s|). Nothing if found_inf is not zero.

    Args:
        tensors, groups, grads: rows of tables.py, one per tensor, group, tensor.
        owners: for every chunk, the index of its tensor.
        row, sums: for every estimate, its row of tables.py, and its two sums, which are written.
        counters: the number of programs that have finished, 0 between launches; whether some x waits for *finish*.
        begin, end: the chunks that are walked; the others keep their partials.
        only, only_bits: the address of a gradient, and the bits of its elements, in the place of `grads`; 0: there.
        adds_up: not 0: the sums are written.
        partials: each chunk's dot, then each chunk's norm.
        ranges: for every estimate, its first chunk; and last, chunk_count.
        record: the STEP words of the step's record.
        T: the type of the arithmetic; for the other constants see elements.py.
    """
    if load_found_inf(record) != 0:
        return
    grad_scale = load_grad_scale(record)
    group = tl.full([], 0, tl.int64)
    c = group_in_update(groups, row, group, grad_scale, T)
    next_owner = load_owner(owners, begin + tl.program_id(0), end)
    for n in tl.range(begin + tl.program_id(0), end, tl.num_programs(0)):
        owner = next_owner
        next_owner = load_owner(owners, n + tl.num_programs(0), end)  # ahead of its use
        # Nothing else of the tensor is loaded before, and would have to be kept meanwhile.
        if load_group(tensors, owner) != group:
            group = load_group(tensors, owner)
            c = group_in_update(groups, row, group, grad_scale, T)
        t, grad = load_tensor(tensors, owner), load_gradient(grads, owner)
        if only != 0:
            grad = Gradient(only, only_bits)
        first = (n - t.first_chunk) * CHUNK
        dot = tl.zeros([], tl.float64)
        norm = tl.zeros([], tl.float64)
        if (grad.address != 0) & c.active:
            dot, norm = update_chunk(order_of(tensors, owner), t, grad, first, c, X, S, G, SAMPLES, KEPT, CHUNK, BLOCK)
            if c.deferred:
                tl.store(counters + 1, 1)
        tl.store(partials + n, dot)
        tl.store(partials + chunk_count + n, norm)
    if adds_up != 0:  # noqa: SIM102 # Triton computes both sides of an `and`
        if is_last_program(counters):
            tl.store(counters, 0)
            for e in tl.range(0, estimate_count):
                first = tl.load(ranges + e)
                last = tl.load(ranges + e + 1)
                tl.store(sums + 2 * e, total(partials, first, last, LANES))
                tl.store(sums + 2 * e + 1, total(partials + chunk_count, first, last, LANES))


# -- finish ------------------------------------------------------------------------------------------------------------


@triton.jit
def advanced(groups, row, sums, e):
    """Returns the estimate e before and after the step, and whether this is a step. e: an index, or a block of them."""
    old = load_estimate(row, e)
    new, stepped = advance(old, tl.load(sums + 2 * e), tl.load(sums + 2 * e + 1), load_options(groups, e))
    return old, new, stepped


@triton.jit
def group_in_finish(groups, row, sums, group, grad_scale, T: tl.constexpr):
    """Returns a group's coefficients, and the change that *finish* makes to its x."""
    old, new, stepped = advanced(groups, row, sums, load_estimate_index(groups, group))
    c = coefficients(load_hyper(groups, group), load_options(groups, group), old, new.d, grad_scale, T)
    return c, finish_of(c.deferred, stepped, new.d != old.d)


@triton.jit
def any_change(groups, row, sums, estimate_count):
    """Returns whether a step that was not deferred has to be corrected or undone."""
    found = tl.zeros([ESTIMATES], tl.int32)
    for first in tl.range(0, estimate_count, ESTIMATES):
        e = tl.minimum(first + tl.arange(0, ESTIMATES), estimate_count - 1)
        old, new, stepped = advanced(groups, row, sums, e)
        # With k == 0, all steps were deferred.
        found |= ((new.d != old.d) | (~stepped & (old.k != 0))).to(tl.int32)
    return tl.max(found, 0) != 0


@triton.jit
def advance_all(groups, row, sums, new_row, estimate_count):
    """Writes all new estimates. `new_row` may be `row`: so nothing else may read that any more."""
    for first in tl.range(0, estimate_count, ESTIMATES):
        e = first + tl.arange(0, ESTIMATES)
        _, new, _ = advanced(groups, row, sums, tl.minimum(e, estimate_count - 1))
        store_estimates(new_row, e, new, e < estimate_count)


@triton.jit
def keep_all(row, new_row, estimate_count):
    """Copies all estimates: the step is skipped."""
    for first in tl.range(0, estimate_count, ESTIMATES):
        e = first + tl.arange(0, ESTIMATES)
        old = load_estimate(row, tl.minimum(e, estimate_count - 1))
        store_estimates(new_row, e, old, e < estimate_count)


@triton.jit(
    do_not_specialize=["last", "chunk_count", "estimate_count"],
    do_not_specialize_on_alignment=["owners", "row", "sums", "new_row"],
)
def prodigy_finish_kernel(
    tensors, owners, row, sums, counters, last, chunk_count, new_row, estimate_count, record, groups, grads,
    T: tl.constexpr, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_new from the sums; x as it would be had *update* known d_new. If found_inf is not zero, new_row is row.

    Args:
        last: not 0: the new estimates are written to new_row, too. For the others, see `prodigy_update_kernel`.
        new_row: as `row`, and may be the same memory.
    """
    if load_found_inf(record) != 0:
        if (last != 0) & (tl.program_id(0) == 0):
            keep_all(row, new_row, estimate_count)
        return
    if any_change(groups, row, sums, estimate_count) | (tl.load(counters + 1) != 0):
        grad_scale = load_grad_scale(record)
        group = tl.full([], 0, tl.int64)
        c, how = group_in_finish(groups, row, sums, group, grad_scale, T)
        for n in tl.range(tl.program_id(0), chunk_count, tl.num_programs(0)):
            owner = load_owner(owners, n, chunk_count)
            if load_group(tensors, owner) != group:
                group = load_group(tensors, owner)
                c, how = group_in_finish(groups, row, sums, group, grad_scale, T)
            t, grad = load_tensor(tensors, owner), load_gradient(grads, owner)
            begin = (n - t.first_chunk) * CHUNK
            if (grad.address != 0) & c.active & (how != NOTHING):
                finish_chunk(t, grad, begin, c, how, X, S, G, SAMPLES, KEPT, CHUNK, BLOCK)
    # The last program overwrites the old estimates, which all others have read.
    if is_last_program(counters):
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
        if last != 0:
            advance_all(groups, row, sums, new_row, estimate_count)
