"""Vectors that are split over several tensors, and their sums in float64."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ..sums import stable_sum

Vector: TypeAlias = list[Tensor]
"""One vector, a tensor per parameter; the tensors may be on different devices."""


def total(parts: Vector) -> float:
    """Returns the sum of the elements of all tensors. Waits for the device, once."""
    sums = [stable_sum(part) for part in parts]
    if all(each.is_cpu for each in sums):
        return sum(map(float, sums))
    return float(torch.stack([each.to(sums[0].device) for each in sums]).sum())


def dot(a: Vector, b: Vector) -> float:
    """Returns the inner product ``<a, b>``."""
    return total([x * y for x, y in zip(a, b, strict=True)])


def norm(a: Vector) -> float:
    """Returns the Euclidean norm ``|a|``."""
    return math.sqrt(dot(a, a))


def norm1(a: Vector) -> float:
    """Returns ``|a|_1``, the sum of the absolute values."""
    return total([x.abs() for x in a])


def plus(a: Vector, factor: float, b: Vector) -> Vector:
    """Returns ``a + factor * b``."""
    return list(torch._foreach_add(a, b, alpha=factor))


def times(factor: float, a: Vector) -> Vector:
    """Returns ``factor * a``."""
    return list(torch._foreach_mul(a, factor))


def squared(a: Vector) -> Vector:
    """Returns the squares of the elements."""
    return list(torch._foreach_mul(a, a))


def zeros(a: Vector) -> Vector:
    """Returns a zero vector of the same shapes."""
    return [torch.zeros_like(x) for x in a]


def ratio(a: float, b: float) -> float:
    """Returns ``a / b``, and 0 where ``b`` is 0: while no gradient has been non-zero, nothing moves."""
    return a / b if b > 0 else 0.0
