"""A step of Prodigy (Mishchenko & Defazio, arXiv 2306.06101, Algorithm 4) over all tensors at once, in two launches.

Notation: x parameters, x0 their start, g gradient, m, v Adam's moments, s the weighted sum of gradients, d the estimate
of the distance, lr the user's factor, bc the bias correction, ``dlr = d*lr*bc``. One step, with the old d unless it says
``d_new``::

    num <- beta3*num + (d/d0)*dlr * sum <g, x0 - x>
    m   <- beta1*m + (1-beta1)*d*g
    v   <- beta2*v + (1-beta2)*(d*g)^2
    s   <- beta3*s + (d/d0)*dlr * g                      (d in the place of dlr with safeguard_warmup)
    d_new: of d_hat = d_coef * num / sum |s|
    x   <- x - weight_decay*dlr*x - dlr * m / (sqrt(v) + d_new*eps)

Note [d is updated between the passes]
Only ``d_new * eps`` in the last line needs the sums over all parameters. So `prodigy_update_kernel` moves x with the
old d while it gathers the sums, and `prodigy_finish_kernel` adds the difference in the rare step in which d moved.

Note [Deferred steps]
Some steps leave x to the second kernel, which then makes it with d_new: the first one (k == 0), because as long as all
gradients are zero x must not move by a bit; those without momentum (beta1 == 0), where d_new is also a factor of the
step; and those that `undo` could not take back exactly enough. `without_step` makes the first kernel's step vanish.

The functions have the names and the order of csrc/prodigy/rule.h, so that the two can be read side by side. T is the
type of the arithmetic, float32 or float64; scalars of a whole step are float64. Floating-point fusion must be off.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# -- what the tables hold: one 8-byte word a field, in this order ------------------------------------------------------

MAX_DIMS = 8


class Tensor(NamedTuple):
    """One tensor: addresses (0: there is none, and x0 is zero everywhere), sizes, and the order of its memory."""

    x: Any
    m: Any
    v: Any
    s: Any
    x0: Any
    numel: Any
    slice_p: Any  # with slice_p > 1, s and x0 are packed samples
    group: Any
    first_chunk: Any
    dims: Any  # 0: row-major; else so many strides follow, and as many row-major ones, from the outermost inwards


class Hyper(NamedTuple):
    """The hyper-parameters of one parameter group, as in prodigy_fused.hyper; an address of lr takes its place."""

    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    decouple: Any
    use_bias_correction: Any
    safeguard_warmup: Any
    maximize: Any


class Shared(NamedTuple):
    """The hyper-parameters of the estimate, common to all groups, and what all gradients are divided by."""

    d0: Any
    d_coef: Any
    growth_rate: Any
    beta3: Any
    grad_scale: Any


class Estimate(NamedTuple):
    """The estimate, in the order of prodigy_fused.estimate.FIELDS."""

    d: Any
    d_max: Any
    d_hat: Any
    d_numerator: Any
    d_denom: Any
    k: Any
    nonfinite_steps: Any
    corrections: Any


ORDER = tl.constexpr(10)  # where a tensor's strides begin
STRIDES = tl.constexpr(MAX_DIMS)
TENSOR_WORDS = tl.constexpr(10 + 2 * MAX_DIMS)
LR_ADDRESS = tl.constexpr(9)  # in a group's row, and behind it the bits of the number there
GROUP_WORDS = tl.constexpr(12)
SHARED_WORDS = tl.constexpr(6)  # even, so that what follows keeps its alignment


# -- the rule ----------------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """What one group's elements need in one step."""

    gradient_scale: Any  # g = gradient_scale * grad + l2 * x
    l2: Any
    d: Any
    beta1: Any
    beta2: Any
    beta3: Any
    one_minus_beta1: Any
    one_minus_beta2: Any
    s_weight: Any
    decay: Any  # x -= decay * x + dlr * m / (sqrt(v) + d_eps)
    dlr: Any
    d_eps: Any
    old_d_eps: Any
    d_new: Any
    dot_weight: Any  # float64, of <g, x0 - x> in the sum over groups, which may differ in lr
    momentum: Any
    deferred: Any
    active: Any  # lr > 0


@triton.jit
def divide(a, b):
    """a / b, rounded as IEEE has it."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def square_root(a):
    """sqrt(a), rounded as IEEE has it."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def is_finite(a):
    """Neither NaN nor infinite."""
    return a - a == 0


@triton.jit
def power(base, n):
    """base^n for a whole n >= 0."""
    result = base * 0 + 1
    while n > 0:
        result = tl.where(n % 2 == 1, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit
def bias_correction(h, k):
    """bc = sqrt(1 - beta2^(k+1)) / (1 - beta1^(k+1)), or 1."""
    bc = h.lr * 0 + 1
    if h.use_bias_correction != 0:
        n = k.to(tl.int64) + 1
        bc = tl.sqrt(1 - power(h.beta2, n)) / (1 - power(h.beta1, n))
    return bc


@triton.jit
def coefficients(h, shared, old, d_new, T: tl.constexpr):
    """Of the old estimate, but for d_eps = d_new*eps: while d_new is not known, d takes its place."""
    bc = bias_correction(h, old.k)
    dlr = old.d * h.lr * bc
    decay = tl.where(h.decouple != 0, h.weight_decay * dlr, 0.0).to(T)
    # See Note [Deferred steps].
    hard_to_undo = (shared.beta3 == 0) | (decay >= 0.5)
    return Coefficients(
        (tl.where(h.maximize != 0, -1.0, 1.0).to(tl.float64) / shared.grad_scale).to(T),
        tl.where(h.decouple != 0, 0.0, h.weight_decay).to(T),
        old.d.to(T),
        h.beta1.to(T),
        h.beta2.to(T),
        shared.beta3.to(T),
        (1 - h.beta1).to(T),
        (1 - h.beta2).to(T),
        (old.d / shared.d0 * tl.where(h.safeguard_warmup != 0, old.d, dlr)).to(T),
        decay,
        dlr.to(T),
        (d_new * h.eps).to(T),
        (old.d * h.eps).to(T),
        d_new.to(T),
        h.lr * bc,
        h.beta1 > 0,
        (h.beta1 <= 0) | (old.k == 0) | hard_to_undo,
        h.lr > 0,
    )


@triton.jit
def without_step(value, c):
    """dlr or decay, 0 where the step is deferred."""
    return tl.where(c.deferred, 0.0, value).to(value.dtype)


@triton.jit
def gradient(grad, x, c):
    """g = gradient_scale*grad + l2*x: true to the objective that is minimised, with coupled weight decay."""
    return c.gradient_scale * grad + c.l2 * x


@triton.jit
def finite_or_zero(g):
    """A gradient that is not finite shows in the sums, which then leave the estimate alone, but not in the state."""
    return tl.where(is_finite(g), g, 0.0).to(g.dtype)


@triton.jit
def sample(g, x, x0, s, c):
    """s <- beta3*s + (d/d0)*dlr*g, for the sampled positions; and the element's part of sum <g, x0 - x> and sum |s|."""
    s = c.beta3 * s + c.s_weight * finite_or_zero(g)
    return s, g * (x0 - x), tl.abs(s)


@triton.jit
def moments(g, m, v, c):
    """m <- beta1*m + (1-beta1)*d*g;  v <- beta2*v + (1-beta2)*(d*g)^2."""
    dg = c.d * finite_or_zero(g)
    return c.beta1 * m + c.one_minus_beta1 * dg, c.beta2 * v + c.one_minus_beta2 * (dg * dg)


@triton.jit
def step(x, m, v, decay, dlr, d_eps):
    """x <- x - (decay*x + dlr * m / (sqrt(v) + d*eps))."""
    return x - (decay * x + dlr * divide(m, square_root(v) + d_eps))


@triton.jit
def correct(x, m, v, c):
    """x <- x + dlr * (m / (sqrt(v) + d*eps) - m / (sqrt(v) + d_new*eps)): as had the first kernel known d_new."""
    root = square_root(v)
    return x + c.dlr * (divide(m, root + c.old_d_eps) - divide(m, root + c.d_eps))


@triton.jit
def undo(x, m, v, c):
    """x <- (x + dlr * m / (sqrt(v) + d*eps)) / (1 - decay): as before a step that turns out to be none."""
    return divide(x + c.dlr * divide(m, square_root(v) + c.d_eps), 1 - c.decay)


@triton.jit
def advance(e, dot, norm, shared):
    """num <- beta3*num + (d/d0)*d*dot;  d_hat = d_coef*num/norm;  d_max <- max(d_max, d_hat);
    d_new = min(d_max, growth_rate * (max(d, d_hat) if d == d0 else d)).

    Returns the new estimate, and whether this is a step: with norm == 0 no gradient has been non-zero yet, and nothing
    changes. With sums that are not finite, it is a step that leaves d alone.
    """
    d = e.d
    numerator = shared.beta3 * e.d_numerator + d / shared.d0 * d * dot
    d_hat = shared.d_coef * numerator / norm
    d_max = tl.where(d_hat > e.d_max, d_hat, e.d_max)
    grown = tl.where((d == shared.d0) & (d_hat > d), d_hat, d) * shared.growth_rate
    stepped = norm != 0
    counts = stepped & is_finite(d_hat) & is_finite(norm)
    d_new = tl.where(counts, tl.where(grown < d_max, grown, d_max), d)
    now = Estimate(
        d_new,
        tl.where(counts, d_max, e.d_max),
        tl.where(counts, d_hat, e.d_hat),
        tl.where(counts, numerator, e.d_numerator),
        tl.where(counts, norm, e.d_denom),
        e.k + stepped.to(tl.float64),
        e.nonfinite_steps + (stepped & ~counts).to(tl.float64),
        e.corrections + (d_new != d).to(tl.float64),
    )
    return now, stepped


# What the second kernel does to x.
NOTHING = tl.constexpr(0)
STEP = tl.constexpr(1)
CORRECT = tl.constexpr(2)
UNDO = tl.constexpr(3)


@triton.jit
def finish_of(deferred, stepped, moved):
    """STEP if the step was deferred, UNDO if it was none, CORRECT if d moved."""
    how = tl.where(stepped, tl.where(moved, CORRECT, NOTHING), UNDO)
    return tl.where(deferred, tl.where(stepped, STEP, NOTHING), how)


@triton.jit
def accumulate(total, error, term, term_error):
    """total <- total + term, the rounding error in `error`: so a sum is the same in any order."""
    following = total + term
    part = following - total
    return following, error + term_error + ((total - (following - part)) + (term - part))


# -- tables and arrays -------------------------------------------------------------------------------------------------


@triton.jit
def load_shared(table, grad_scale):
    """The words of Shared; `grad_scale` points to the last of them, or to a number that takes its place."""
    scale = tl.load(grad_scale).to(tl.float64)
    return Shared(tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3), scale)


@triton.jit
def load_estimate(row):
    return Estimate(
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
    )


@triton.jit
def store_estimate(row, e):
    tl.store(row, e.d)
    tl.store(row + 1, e.d_max)
    tl.store(row + 2, e.d_hat)
    tl.store(row + 3, e.d_numerator)
    tl.store(row + 4, e.d_denom)
    tl.store(row + 5, e.k)
    tl.store(row + 6, e.nonfinite_steps)
    tl.store(row + 7, e.corrections)


@triton.jit
def load_hyper(groups, group):
    row = groups + group * GROUP_WORDS
    lr = tl.load(row)
    address = tl.load(row.to(tl.pointer_type(tl.int64)) + LR_ADDRESS)
    if address != 0:
        if tl.load(row.to(tl.pointer_type(tl.int64)) + LR_ADDRESS + 1) == 32:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
    return Hyper(
        lr,
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
    )


@triton.jit
def load_tensor(tensors, index):
    row = tensors + index * TENSOR_WORDS
    return Tensor(
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
        tl.load(row + 9),
    )


@triton.jit
def array(address, begin, T: tl.constexpr, FULL: tl.constexpr):
    """A pointer to the element `begin` of the array at an address; FULL: known to be a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(T)) + begin
    return tl.multiple_of(pointer, 16) if FULL else pointer


@triton.jit
def is_full(t, grad, begin, CHUNK: tl.constexpr):
    """Whether a chunk has all its elements, and all arrays that are walked with one index start at 16 bytes."""
    addresses = t.x | grad | t.m | t.v | tl.where(t.slice_p == 1, t.s | t.x0, 0)
    return (begin + CHUNK <= t.numel) & (addresses % 16 == 0)


@triton.jit
def inside(i, size, FULL: tl.constexpr):
    """Which elements of a block are there: all, known when compiled, so that no mask is in the way of 16-byte accesses."""
    return tl.full(i.shape, True, tl.int1) if FULL else i < size


@triton.jit
def sampled_at(order, t, begin, i, CHUNK: tl.constexpr):
    """Whether the element at memory position begin + i is sampled, at row-major positions 0, p, 2p, ..., and where in s."""
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
def update_walk(
    order, t, grad, begin, c, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    SAMPLED: tl.constexpr,
):  # fmt: skip
    """m, v, s and x of a chunk, x with the old d; returns each lane's part of sum <g, x0 - x> and sum |s|."""
    grad, x = array(grad, begin, T, FULL), array(t.x, begin, T, FULL)
    m, v = array(t.m, begin, T, FULL), array(t.v, begin, T, FULL)
    s = array(t.s, 0 if SAMPLED else begin, T, FULL and not SAMPLED)
    x0 = array(t.x0, 0 if SAMPLED else begin, T, FULL and not SAMPLED)
    decay, dlr = without_step(c.decay, c), without_step(c.dlr, c)
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
        old_x = tl.load(x + i, here, 0.0)
        old_v = tl.load(v + i, here, 0.0)
        kept = tl.where(c.momentum, here, False)  # without momentum m is not kept, and x waits
        old_m = tl.load(m + i, kept, 0.0)
        old_s = tl.load(s + index, taken, 0.0)
        start = tl.load(x0 + index, tl.where(t.x0 != 0, taken, False), 0.0)

        g = gradient(tl.load(grad + i, here, 0.0), old_x, c)
        new_s, my_dot, my_norm = sample(g, old_x, start, old_s, c)
        dot += tl.where(taken, my_dot, 0.0)
        norm += tl.where(taken, my_norm, 0.0)
        new_m, new_v = moments(g, old_m, old_v, c)
        tl.store(s + index, new_s, taken)
        tl.store(v + i, new_v, here)
        tl.store(m + i, new_m, kept)
        tl.store(x + i, step(old_x, new_m, new_v, decay, dlr, c.d_eps), kept)
    return dot, norm


@triton.jit
def update_chunk(order, t, grad, begin, c, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The chunk's part of lr*bc * sum <g, x0 - x> and of sum |s|, in float64; which lane has which element is fixed."""
    full = is_full(t, grad, begin, CHUNK)
    if t.slice_p == 1:
        if full:
            dot, norm = update_walk(order, t, grad, begin, c, T, CHUNK, BLOCK, True, False)
        else:
            dot, norm = update_walk(order, t, grad, begin, c, T, CHUNK, BLOCK, False, False)
    else:
        if full:
            dot, norm = update_walk(order, t, grad, begin, c, T, CHUNK, BLOCK, True, True)
        else:
            dot, norm = update_walk(order, t, grad, begin, c, T, CHUNK, BLOCK, False, True)
    return tl.sum(dot.to(tl.float64)) * c.dot_weight, tl.sum(norm.to(tl.float64))


@triton.jit
def finish_walk(
    t, grad, begin, c, how, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """x of a chunk: the step that was deferred, the correction, or the step taken back."""
    x, v = array(t.x, begin, T, FULL), array(t.v, begin, T, FULL)
    direction = array(tl.where(c.momentum, t.m, grad), begin, T, FULL)
    size = tl.minimum(t.numel - begin, CHUNK).to(tl.int32)
    for first in tl.range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = inside(i, size, FULL)
        old_x = tl.load(x + i, here, 0.0)
        new_v = tl.load(v + i, here, 0.0)
        new_m = tl.load(direction + i, here, 0.0)
        if how == STEP:
            if not c.momentum:
                new_m = c.d_new * finite_or_zero(gradient(new_m, old_x, c))
            new_x = step(old_x, new_m, new_v, c.decay, c.dlr, c.d_eps)
        elif how == CORRECT:
            new_x = correct(old_x, new_m, new_v, c)
        else:
            new_x = undo(old_x, new_m, new_v, c)
        tl.store(x + i, new_x, here)


# -- the kernels -------------------------------------------------------------------------------------------------------
#
# Note [The number of programs is not in the result]
# A chunk's sums go to its own place in `partials`, whichever program took it, and one program adds them up, in a way
# that does not depend on their order. So neither the size of the device nor the order of programs is in the bits.


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
    tensors, owners, row, sums, counters, partials, chunk_count, shared, groups, grads, grad_scale, found_inf,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """m, v, s, x with the old d in d*eps; sums = (sum lr*bc*<g, x0 - x>, sum |s|).

    Chunk n belongs to tensor owners[n], whose gradient is at address grads[owners[n]], or 0. A found_inf that is not
    zero means: no step. counters = (programs that are through, whether some x waits for the second kernel).
    """
    if tl.load(found_inf) != 0:
        return
    old, common = load_estimate(row), load_shared(shared, grad_scale)
    current = tl.load(tensors) * 0
    c = coefficients(load_hyper(groups, current), common, old, old.d, T)
    for n in tl.range(tl.program_id(0), chunk_count, tl.num_programs(0)):
        owner = tl.load(owners + n)
        t = load_tensor(tensors, owner)
        grad = tl.load(grads + owner)
        if t.group != current:
            current = t.group
            c = coefficients(load_hyper(groups, current), common, old, old.d, T)
        dot = c.dot_weight * 0
        norm = c.dot_weight * 0
        if (grad != 0) & c.active:
            begin = (n - t.first_chunk) * CHUNK
            order = tensors + owner * TENSOR_WORDS + ORDER
            dot, norm = update_chunk(order, t, grad, begin, c, T, CHUNK, BLOCK)
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
    tensors, owners, row, sums, counters, last, chunk_count, shared, groups, grads, grad_scale, found_inf,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_new of the sums; x as it would be had the first kernel known d_new. last != 0: the estimate is written, too."""
    if tl.load(found_inf) != 0:
        return
    # Every program derives the same estimate. The last to have read the old one overwrites it.
    old, common = load_estimate(row), load_shared(shared, grad_scale)
    now, stepped = advance(old, tl.load(sums), tl.load(sums + 1), common)
    moved = now.d != old.d
    if moved | ~stepped | (tl.load(counters + 1) != 0):
        current = tl.load(tensors) * 0
        c = coefficients(load_hyper(groups, current), common, old, now.d, T)
        for n in tl.range(tl.program_id(0), chunk_count, tl.num_programs(0)):
            owner = tl.load(owners + n)
            t = load_tensor(tensors, owner)
            grad = tl.load(grads + owner)
            if t.group != current:
                current = t.group
                c = coefficients(load_hyper(groups, current), common, old, now.d, T)
            how = finish_of(c.deferred, stepped, moved)
            if (grad != 0) & c.active & (how != NOTHING):
                begin = (n - t.first_chunk) * CHUNK
                if is_full(t, grad, begin, CHUNK):
                    finish_walk(t, grad, begin, c, how, T, CHUNK, BLOCK, True)
                else:
                    finish_walk(t, grad, begin, c, how, T, CHUNK, BLOCK, False)
    if is_last_program(counters):
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
        if last != 0:
            store_estimate(row, now)
