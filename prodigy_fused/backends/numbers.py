"""The scalars of a run of foreach."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hyper import EstimateOptions, Hyper
from .elementwise import bias_correction

LEAST_DLR = 1e-30  # whose reciprocal float32 can hold


class Numbers(NamedTuple):
    """The scalars of a run: numbers on a CPU, elsewhere 0-dim tensors, which nobody waits for."""

    k: Any
    d: Any
    lr: Any  # with the bias correction
    weight: Any  # of g in s, divided by 1 - beta3
    beta3: float
    grad_scale: float
    d_new: Any = None
    decay: Any = None
    shrink: Any = None  # m is multiplied by dlr and divided by shrink * sqrt(v) + shift
    shift: Any = None
    dlr: float = 1.0  # or it is in the last two


def numbers_of(h: Hyper, options: EstimateOptions, old: Any, grad_scale: float) -> Numbers:
    """Returns the scalars of the first phase."""
    d, lr = old["d"], float(h.lr) * bias_correction(h, old["k"])
    weight = d / options.d0 * (d if h.safeguard_warmup else d * lr) / (1 - options.beta3)
    return Numbers(old["k"], d, lr, weight, options.beta3, grad_scale)


def with_new_estimate(numbers: Numbers, h: Hyper, new: Any) -> Numbers:
    """Adds the scalars of the second phase."""
    dlr, d_new = numbers.d * numbers.lr, new["d"]
    numbers = numbers._replace(d_new=d_new, decay=h.weight_decay * dlr)
    if not isinstance(dlr, Tensor):
        return numbers._replace(shift=d_new * h.eps, dlr=dlr)
    is_step = new["k"] != numbers.k  # else every gradient has been zero, and x stays
    dlr = dlr.clamp(min=LEAST_DLR)
    shrink, shift = torch.where(is_step, 1 / dlr, 0.0), torch.where(is_step, d_new * h.eps / dlr, math.inf)
    return numbers._replace(decay=numbers.decay * is_step, shrink=shrink, shift=shift)
