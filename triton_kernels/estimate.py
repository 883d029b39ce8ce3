"""The estimate d in Triton: how a step's two sums, over all elements of all its tensors, give d_new.

All functions are elementwise: they take the numbers of one estimate, or of many at once. Floating-point fusion must be
off.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# tables.py has a word for each field of these two, in this order.


class EstimateOptions(NamedTuple):
    """The hyper-parameters of an estimate, common to all its groups, as in prodigy_fused.hyper."""

    d0: Any
    d_coef: Any
    growth_rate: Any
    beta3: Any
    d_limit: Any
    frozen: Any


class Estimate(NamedTuple):
    """An estimate, as in prodigy_fused.estimate."""

    d: Any
    d_max: Any
    d_hat: Any
    d_numerator: Any
    d_denom: Any
    k: Any
    nonfinite_steps: Any
    corrections: Any


@triton.jit
def is_finite(a):
    """Returns whether `a` is neither NaN nor infinite."""
    return tl.abs(a) < float("inf")


@triton.jit
def advance(e, dot, norm, options):
    """num <- beta3*num + (d/d0)*d*dot;  d_hat = d_coef*num/norm;  d_max <- max(d_max, d_hat);
    d_new = min(d_max, growth_rate * (max(d, d_hat) if d == d0 else d), d_limit).

    Returns the new estimate and whether this is a step: with norm == 0 no gradient has been non-zero yet, and d stays.
    If the sums are not finite, it is a step that leaves d alone. (Non-finite gradients count as zero in the norm.)
    If the estimate is frozen, there are no sums: it is a step that changes k and nothing else.
    """
    d = e.d
    numerator = options.beta3 * e.d_numerator + d / options.d0 * d * dot
    d_hat = options.d_coef * numerator / norm
    d_max = tl.where(d_hat > e.d_max, d_hat, e.d_max)
    grown = tl.where((d == options.d0) & (d_hat > d), d_hat, d) * options.growth_rate
    bounded = tl.where(grown < d_max, grown, d_max)
    bounded = tl.where(options.d_limit < bounded, options.d_limit, bounded)
    frozen = options.frozen != 0
    stepped = frozen | (norm != 0)
    finite = frozen | tl.where(stepped, is_finite(d_hat) & is_finite(norm), is_finite(dot))
    is_updated = ~frozen & stepped & finite
    d_new = tl.where(is_updated, bounded, d)
    new = Estimate(
        d=d_new,
        d_max=tl.where(is_updated, d_max, e.d_max),
        d_hat=tl.where(is_updated, d_hat, e.d_hat),
        d_numerator=tl.where(is_updated, numerator, e.d_numerator),
        d_denom=tl.where(is_updated, norm, e.d_denom),
        k=e.k + stepped.to(tl.float64),
        nonfinite_steps=e.nonfinite_steps + (~finite).to(tl.float64),
        corrections=e.corrections + (d_new != d).to(tl.float64),
    )
    return new, stepped


@triton.jit
def accumulate(total, error, term, term_error):
    """total <- total + term, its rounding error added to `error`: a compensated sum (Knuth's TwoSum). Returns both.

    total + error depends on the order of the terms only in its last bit, about once in 2^50 sums: see Accumulator in
    csrc/prodigy/rule.h.
    """
    next_total = total + term
    part = next_total - total
    return next_total, error + term_error + ((total - (next_total - part)) + (term - part))
