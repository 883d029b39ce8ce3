"""The numbers of a step that may be on a device."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import options, record
from .hyper import Hyper
from .options import Group, Scalar


class Scalars(NamedTuple):
    """The numbers of one step."""

    hypers: list[Hyper]
    grad_scale: Scalar
    found_inf: Scalar


def scalars_of(
    groups: list[Group], reads_device: bool, hypers: list[Hyper], grad_scale: Any, found_inf: Any
) -> Scalars:
    """Returns the scalars of a step, checked: tensors if they are on a device and the plans read them there, else
    numbers, for which the host waits.

    Raises:
        ValueError: an ``lr`` is negative or not finite, or a tensor is not one that kernels can read.
    """
    scale = 1.0 if grad_scale is None else grad_scale
    inf = 0.0 if found_inf is None else found_inf
    if not reads_device:
        if any(isinstance(h.lr, Tensor) for h in hypers):
            hypers = [h._replace(lr=options.check_lr(g)) for g, h in zip(groups, hypers, strict=True)]
        return Scalars(hypers, float(scale), float(inf))
    scale, inf = (value if options.on_device(value) else float(value) for value in (scale, inf))
    for name, value in (("grad_scale", scale), ("found_inf", inf), *(("lr", h.lr) for h in hypers)):
        record.scalar_words(name, value)  # raises if kernels cannot read it
    return Scalars(hypers, scale, inf)
