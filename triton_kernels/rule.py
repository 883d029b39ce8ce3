"""Prodigy's mathematics (docs/algorithm.md, Algorithm 4) in Triton: registers in, registers out.

Notation: x parameters, x0 their initial values, g gradient, m, v Adam's moments, s the weighted sum of gradients, d the
estimate of the distance, lr the user's factor, bc the bias correction, ``dlr = d*lr*bc``. A step, with the old d except
where it says ``d_new``::

    num <- beta3*num + (d/d0)*dlr * sum <g, x0 - x>
    m   <- beta1*m + (1-beta1)*d*g
    v   <- beta2*v + (1-beta2)*(d*g)^2
    s   <- beta3*s + (d/d0)*dlr * g                      (with safeguard_warmup: d instead of dlr)
    d_new from d_hat = d_coef * num / sum |s|            (estimate.py)
    x   <- x - weight_decay*dlr*x - dlr * m / (sqrt(v) + d_new*eps)

Note [d is updated between the passes]
Only ``d_new * eps`` in the last line needs the sums over all parameters. So the first kernel, *update*, moves x with
the old d while it gathers the sums, and the second, *finish*, adds the difference in the rare step in which d changed.

Note [Deferred steps]
Some steps leave x to *finish*, which then moves it with d_new: the first one (k == 0), because while all gradients are
zero, x must stay bitwise unchanged; those without momentum (beta1 == 0), where d_new is also a factor of the step; and
those that `undo` could not invert accurately (beta3 == 0, or decay >= 0.5). For them, `without_step` makes the step of
*update* zero.

The functions here and in estimate.py have the names and the order of csrc/prodigy/rule.h, so that they can be read side
by side. T is the type of the arithmetic, float32 or float64, whatever the types in memory are (rounding.py); scalars of
a whole step are float64. Floating-point fusion must be off.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .estimate import is_finite


class Hyper(NamedTuple):
    """The hyper-parameters of one parameter group's update. tables.py has a word for each field, in this order."""

    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    decouple: Any
    use_bias_correction: Any
    safeguard_warmup: Any
    maximize: Any


class Coefficients(NamedTuple):
    """The factors of one group in one step."""

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
    dot_weight: Any  # lr*bc in float64, the weight of <g, x0 - x> in the sum over groups, which may differ in lr
    momentum: Any  # beta1 > 0
    deferred: Any  # see Note [Deferred steps]
    active: Any  # lr > 0
    k: Any  # uint32, for random bits


@triton.jit
def divide(a, b):
    """Returns a / b, correctly rounded."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def square_root(a):
    """Returns sqrt(a), correctly rounded."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def quotient(m, v, d_eps, S: tl.constexpr):
    """Returns m / (sqrt(v) + d_eps), correctly rounded.

    Where m and v are stored in 16 bits, a few units in the last of float32's places do not matter, and root and
    quotient are what the device takes least time for: on a GPU nearly half of the instructions would else be theirs.
    """
    if S.primitive_bitwidth == 16:
        return m / (tl.sqrt(v) + d_eps)
    else:
        return divide(m, square_root(v) + d_eps)


@triton.jit
def power(base, n):
    """Returns base^n for an integer n >= 0."""
    result = tl.full([], 1, base.dtype)
    while n > 0:
        result = tl.where(n % 2 == 1, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit
def bias_correction(h, k):
    """Returns bc = sqrt(1 - beta2^(k+1)) / (1 - beta1^(k+1)), or 1 if the group does not use it."""
    bc = tl.full([], 1, h.lr.dtype)
    if h.use_bias_correction != 0:
        n = k.to(tl.int64) + 1
        bc = tl.sqrt(1 - power(h.beta2, n)) / (1 - power(h.beta1, n))
    return bc


@triton.jit
def coefficients(h, options, old, d_new, grad_scale, T: tl.constexpr):
    """Returns the coefficients of a group, all from its old estimate except d_eps = d_new*eps and d_new.

    In *update*, where d_new is not known yet, the old d stands for it. Gradients are divided by grad_scale.
    """
    bc = bias_correction(h, old.k)
    dlr = old.d * h.lr * bc
    decay = tl.where(h.decouple != 0, h.weight_decay * dlr, 0.0).to(T)
    hard_to_undo = (options.beta3 == 0) | (decay >= 0.5)
    return Coefficients(
        gradient_scale=(tl.where(h.maximize != 0, -1.0, 1.0).to(tl.float64) / grad_scale).to(T),
        l2=tl.where(h.decouple != 0, 0.0, h.weight_decay).to(T),
        d=old.d.to(T),
        beta1=h.beta1.to(T),
        beta2=h.beta2.to(T),
        beta3=options.beta3.to(T),
        one_minus_beta1=(1 - h.beta1).to(T),
        one_minus_beta2=(1 - h.beta2).to(T),
        s_weight=(old.d / options.d0 * tl.where(h.safeguard_warmup != 0, old.d, dlr)).to(T),
        decay=decay,
        dlr=dlr.to(T),
        d_eps=(d_new * h.eps).to(T),
        old_d_eps=(old.d * h.eps).to(T),
        d_new=d_new.to(T),
        dot_weight=h.lr * bc,
        momentum=h.beta1 > 0,
        deferred=(h.beta1 <= 0) | (old.k == 0) | hard_to_undo,
        active=h.lr > 0,
        k=old.k.to(tl.int64).to(tl.uint32),
    )


@triton.jit
def without_step(value, c):
    """Returns `value` (dlr or decay), or 0 if the step is deferred."""
    return tl.where(c.deferred, 0.0, value).to(value.dtype)


# Note [Not finite]
# A gradient that is not finite counts as 0 in the state, which so stays finite; the sums tell, and d is left alone.
# Weight decay leaves an x alone that is not finite. So where the gradient is 0, an x of -inf (a mask) stays what it is,
# instead of becoming -inf + inf = NaN, and is left out of the sums, instead of making them 0 * inf = NaN in every step.


@triton.jit
def finite_or_zero(a):
    """Returns `a`, or 0 where it is not finite."""
    return tl.where(is_finite(a), a, 0.0).to(a.dtype)


@triton.jit
def gradient(grad, x, c):
    """Returns g = gradient_scale*grad + l2*x, the gradient of the function that is minimised."""
    g = c.gradient_scale * grad
    if c.l2 != 0:  # asked once for all elements
        g += c.l2 * finite_or_zero(x)
    return g


@triton.jit
def sample(g, distance, s, c):
    """s <- beta3*s + (d/d0)*dlr*g, at the sampled positions; distance: x0 - x.

    Returns s and each element's terms of sum <g, x0 - x> and of sum |s|.
    """
    s = c.beta3 * s + c.s_weight * finite_or_zero(g)
    return s, tl.where(g == 0, 0.0, g * distance), tl.abs(s)


@triton.jit
def moments(g, m, v, c):
    """m <- beta1*m + (1-beta1)*d*g;  v <- beta2*v + (1-beta2)*(d*g)^2. Returns both."""
    dg = c.d * finite_or_zero(g)
    return c.beta1 * m + c.one_minus_beta1 * dg, c.beta2 * v + c.one_minus_beta2 * dg * dg


# Note [Position]
# `position` is the stored quantity that a step updates: x itself, or delta = x - x0 where that is what is kept.
# `origin` is x - position: 0, or x0.


@triton.jit
def step_by(quotient, position, x, decay, dlr):
    """position <- position - (decay*x + dlr*quotient); quotient: m / (sqrt(v) + d*eps)."""
    change = dlr * quotient
    if decay != 0:  # asked once for all elements
        change = decay * finite_or_zero(x) + change
    return position - change


@triton.jit
def step(position, x, m, root, decay, dlr, d_eps):
    """The same, of m and root: sqrt(v), as in the next two."""
    return step_by(divide(m, root + d_eps), position, x, decay, dlr)


@triton.jit
def correct(position, m, root, c):
    """position <- position + dlr * (m / (sqrt(v) + d*eps) - m / (sqrt(v) + d_new*eps)).

    Replaces d*eps by d_new*eps in the step that *update* took.
    """
    return position + c.dlr * (divide(m, root + c.old_d_eps) - divide(m, root + c.d_eps))


@triton.jit
def undo(position, origin, m, root, c):
    """position <- (position + decay*origin + dlr * m / (sqrt(v) + d*eps)) / (1 - decay).

    Takes the step of *update* back, to one rounding, because it turned out not to be a step.
    """
    before = position + c.decay * finite_or_zero(origin) + c.dlr * divide(m, root + c.d_eps)
    return divide(before, 1 - c.decay)


# The change that *finish* makes to x.
NOTHING = tl.constexpr(0)
STEP = tl.constexpr(1)
CORRECT = tl.constexpr(2)
UNDO = tl.constexpr(3)


@triton.jit
def finish_of(deferred, stepped, moved):
    """Returns the change: STEP if the step was deferred, UNDO if it was none, CORRECT if d changed."""
    how = tl.where(stepped, tl.where(moved, CORRECT, NOTHING), UNDO)
    return tl.where(deferred, tl.where(stepped, STEP, NOTHING), how)
