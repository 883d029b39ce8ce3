"""Prodigy's mathematics (Mishchenko & Defazio, arXiv 2306.06101, Algorithm 4) in Triton: registers in, registers out.

Notation: x parameters, x0 their start, g gradient, m, v Adam's moments, s the weighted sum of gradients, d the estimate
of the distance, lr the user's factor, bc the bias correction, ``dlr = d*lr*bc``. A step, with the old d unless it says
``d_new``::

    num <- beta3*num + (d/d0)*dlr * sum <g, x0 - x>
    m   <- beta1*m + (1-beta1)*d*g
    v   <- beta2*v + (1-beta2)*(d*g)^2
    s   <- beta3*s + (d/d0)*dlr * g                      (d in the place of dlr with safeguard_warmup)
    d_new: of d_hat = d_coef * num / sum |s|
    x   <- x - weight_decay*dlr*x - dlr * m / (sqrt(v) + d_new*eps)

Note [d is updated between the passes]
Only ``d_new * eps`` in the last line needs the sums over all parameters. So the first kernel, *update*, moves x with
the old d while it gathers the sums, and the second, *finish*, adds the difference in the rare step in which d moved.

Note [Deferred steps]
Some steps leave x to *finish*, which then makes it with d_new: the first one (k == 0), because as long as all
gradients are zero x must not move by a bit; those without momentum (beta1 == 0), where d_new is also a factor of the
step; and those that `undo` could not take back exactly enough. `without_step` makes the step of *update* vanish.

The functions have the names and the order of csrc/prodigy/rule.h, so that the two can be read side by side. T is the
type of the arithmetic, float32 or float64, whatever the types in memory are (storage.py); scalars of a whole step are
float64. Floating-point fusion must be off.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# -- numbers, in the order in which tables hold them: one 8-byte word a field -----------------------------------------


class Hyper(NamedTuple):
    """The hyper-parameters of one parameter group, as in prodigy_fused.hyper."""

    lr: Any  # behind the others follow the address of a number that takes its place, or 0, and that number's bits
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
    grad_scale: Any  # like lr


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
    k: Any  # uint32, for random bits


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
        old.k.to(tl.int64).to(tl.uint32),
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
def sample(g, distance, s, c):
    """s <- beta3*s + (d/d0)*dlr*g, for the sampled positions; and the element's part of sum <g, x0 - x> and sum |s|.

    distance: x0 - x.
    """
    s = c.beta3 * s + c.s_weight * finite_or_zero(g)
    return s, g * distance, tl.abs(s)


@triton.jit
def moments(g, m, v, c):
    """m <- beta1*m + (1-beta1)*d*g;  v <- beta2*v + (1-beta2)*(d*g)^2."""
    dg = c.d * finite_or_zero(g)
    return c.beta1 * m + c.one_minus_beta1 * dg, c.beta2 * v + c.one_minus_beta2 * dg * dg


# Note [Position]
# What moves is `at`: x itself, or its displacement from x0 where that is what is kept. `origin` is what x is more than
# `at`: 0, or x0.


@triton.jit
def step(at, x, m, v, decay, dlr, d_eps):
    """at <- at - (decay*x + dlr * m / (sqrt(v) + d*eps))."""
    return at - (decay * x + dlr * divide(m, square_root(v) + d_eps))


@triton.jit
def correct(at, m, v, c):
    """at <- at + dlr * (m / (sqrt(v) + d*eps) - m / (sqrt(v) + d_new*eps)): as had the first kernel known d_new."""
    root = square_root(v)
    return at + c.dlr * (divide(m, root + c.old_d_eps) - divide(m, root + c.d_eps))


@triton.jit
def undo(at, origin, m, v, c):
    """at <- (at + decay*origin + dlr * m / (sqrt(v) + d*eps)) / (1 - decay): as before a step that is none."""
    return divide(at + c.decay * origin + c.dlr * divide(m, square_root(v) + c.d_eps), 1 - c.decay)


@triton.jit
def advance(e, dot, norm, shared):
    """num <- beta3*num + (d/d0)*d*dot;  d_hat = d_coef*num/norm;  d_max <- max(d_max, d_hat);
    d_new = min(d_max, growth_rate * (max(d, d_hat) if d == d0 else d)).

    Returns the new estimate, and whether this is a step: with norm == 0 no gradient has been non-zero yet, and d stays.
    With sums that are not finite, it is a step that leaves d alone. (Non-finite entries count as zero in the norm.)
    """
    d = e.d
    numerator = shared.beta3 * e.d_numerator + d / shared.d0 * d * dot
    d_hat = shared.d_coef * numerator / norm
    d_max = tl.where(d_hat > e.d_max, d_hat, e.d_max)
    grown = tl.where((d == shared.d0) & (d_hat > d), d_hat, d) * shared.growth_rate
    stepped = norm != 0
    finite = tl.where(stepped, is_finite(d_hat) & is_finite(norm), is_finite(dot))
    counts = stepped & finite
    d_new = tl.where(counts, tl.where(grown < d_max, grown, d_max), d)
    now = Estimate(
        d_new,
        tl.where(counts, d_max, e.d_max),
        tl.where(counts, d_hat, e.d_hat),
        tl.where(counts, numerator, e.d_numerator),
        tl.where(counts, norm, e.d_denom),
        e.k + stepped.to(tl.float64),
        e.nonfinite_steps + (~finite).to(tl.float64),
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
