"""Prodigy's and D-Adaptation's methods for convex f, with the numbers of the Prodigy paper's algorithms.

K. Mishchenko, A. Defazio, *Prodigy: An Expeditiously Adaptive Parameter-Free Learner*, ICML 2024 (arXiv 2306.06101);
A. Defazio, K. Mishchenko, *Learning-Rate-Free Learning by D-Adaptation*, ICML 2023 (arXiv 2301.07733).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..options import number
from .base import BOUND, DISTANCE, Option
from .subgradient import Iterate, SubgradientMethod
from .vectors import Vector, dot, norm, norm1, plus, ratio, squared, times, zeros

THRESHOLD = Option("a number from 1 up", lambda value: 1 <= number(value) < math.inf)
DUAL = ("x0", "z", "mean", "s")


class Estimating(SubgradientMethod):
    """A method that starts with the estimate ``d0`` and knows a bound ``G``, or 0, of the gradients' norm.

    Args:
        params: the parameters, or groups of them; float64, float32, or 16 bits; any shapes.
        d0: the first estimate of ``|x0 - x*|``, in the parameters' unit, from 1e-100 to 1e100. The theorems want at
            most ``|x0 - x*|``.
        G: a bound of the subgradients' norm, in the gradients' unit, or 0 if none is known. The theorems want one.

    Raises:
        ValueError: an argument out of range, which is named, or a parameter that cannot be optimized.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {"d0": DISTANCE, "G": BOUND}

    def __init__(self, params: Any, d0: float = 1e-6, G: float = 0.0) -> None:
        super().__init__(params, {"d0": d0, "G": G})


class ProdigyGD(Estimating):
    """Prodigy in the form of gradient descent: the paper's Algorithm 1.

    ```text
    eta_k     = d_k^2 lambda_k / sqrt(d_k^2 G^2 + sum_{i<=k} d_i^2 lambda_i^2 |g_i|^2)
    x_{k+1}   = x_k - eta_k g_k
    d_hat     = sum_{i<=k} eta_i <g_i, x0 - x_i> / |x_{k+1} - x0|
    d_{k+1}   = max(d_k, d_hat)
    average() = sum eta_k x_k / sum eta_k
    ```

    Args:
        params: the parameters, or groups of them; float64, float32, or 16 bits; any shapes.
        d0: the first estimate of ``|x0 - x*|``, in the parameters' unit.
        G: a bound of the subgradients' norm, in the gradients' unit, or 0. The theorem wants a bound of all of them.
        weights: ``lambda_k`` as a function of k = 0, 1, ..., positive; None for 1. The theorem wants 1 or more, and
            not decreasing. It is not in ``state_dict()``: give it again where a checkpoint is loaded.

    Raises:
        ValueError: an argument out of range, which is named, or a parameter that cannot be optimized.

    Example:
        >>> import torch
        >>> from prodigy_fused.convex import ProdigyGD
        >>> x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        >>> opt = ProdigyGD([x])
        >>> for _ in range(500):
        ...     opt.zero_grad()
        ...     (x - torch.tensor([3.0, -4.0])).norm().backward()
        ...     opt.step()
        >>> opt.d < 5 < 3 * opt.d
        True
        >>> bool((opt.average()[0] - torch.tensor([3.0, -4.0])).norm() < 0.5)
        True
    """

    def __init__(
        self, params: Any, d0: float = 1e-6, G: float = 0.0, weights: Callable[[int], float] | None = None
    ) -> None:
        if weights is not None and not callable(weights):
            raise ValueError(f"Invalid weights: {weights!r}: must be a function of k, or None")
        super().__init__(params, d0, G)
        self.weights = weights

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        d2, weight = at.d**2, self._weight(at.k)
        at.squares += d2 * weight**2 * gg
        eta = ratio(d2 * weight, math.sqrt(d2 * self._option("G") ** 2 + at.squares))
        at.inner -= eta * dot(g, at.z)
        at.z = plus(at.z, -eta, g)
        at.estimate(ratio(at.inner, norm(at.z)))
        return eta

    def _weight(self, k: int) -> float:
        weight = 1.0 if self.weights is None else number(self.weights(k))
        if not 0 < weight < math.inf:
            raise ValueError(f"Invalid weights: weights({k}) = {weight}: must be a positive number")
        return weight

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "weights": self.weights}


class ProdigyDA(Estimating):
    """Prodigy in the form of dual averaging: the paper's Algorithm 2.

    ```text
    s_{k+1}   = s_k + d_k^2 g_k
    d_hat     = sum_{i<=k} d_i^2 <g_i, x0 - x_i> / |s_{k+1}|
    d_{k+1}   = max(d_k, d_hat)
    x_{k+1}   = x0 - s_{k+1} / sqrt(d_{k+1}^2 G^2 + sum_{i<=k} d_i^2 |g_i|^2)
    average() = sum d_k^2 x_k / sum d_k^2
    ```

    Arguments and errors are those of :class:`ProdigyGD`, but there are no ``weights``.
    """

    VECTORS = DUAL

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        weight = at.d**2
        at.s = plus(at.s, weight, g)
        at.inner -= weight * dot(g, at.z)
        at.squares += weight * gg
        d = at.estimate(ratio(at.inner, norm(at.s)))
        gamma = ratio(1.0, math.sqrt(d**2 * self._option("G") ** 2 + at.squares))
        at.z = times(-gamma, at.s)
        return weight


class DAdaptReset(SubgradientMethod):
    """D-Adaptation with resetting: the Prodigy paper's Algorithm 3.

    Dual averaging with a constant ``d_r``, from ``x0`` anew whenever the estimate has more than doubled. All sums are
    since the last reset:

    ```text
    s_{k+1}   = s_k + d_r g_k
    d_hat     = sum d_r <g_i, x0 - x_i> / |s_{k+1}|
    d_hat > threshold * d_r:  d_{r+1} = d_hat, s = 0, x_{k+1} = x0, a new epoch
    else:     x_{k+1} = x0 - s_{k+1} / sqrt(G^2 + sum |g_i|^2)
    average() = the unweighted average of all x_k, over all epochs
    ```

    Args:
        params: the parameters, or groups of them; float64, float32, or 16 bits; any shapes.
        d0: the first estimate of ``|x0 - x*|``, in the parameters' unit.
        G: a bound of the subgradients' norm, in the gradients' unit, or 0.
        threshold: the factor by which the estimate must have grown for a reset; the paper's is 2.

    Raises:
        ValueError: an argument out of range, which is named, or a parameter that cannot be optimized.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {"d0": DISTANCE, "G": BOUND, "threshold": THRESHOLD}
    VECTORS = DUAL

    def __init__(self, params: Any, d0: float = 1e-6, G: float = 0.0, threshold: float = 2.0) -> None:
        super().__init__(params, {"d0": d0, "G": G, "threshold": threshold})

    @property
    def epoch(self) -> int:
        """The number of resets so far."""
        return int(self._numbers()[0]["epoch"])

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        at.s = plus(at.s, at.d, g)
        at.inner -= at.d * dot(g, at.z)
        at.squares += gg
        at.d_hat = ratio(at.inner, norm(at.s))
        if at.d_hat > self._option("threshold") * at.d:
            at.d, at.epoch = at.d_hat, at.epoch + 1
            at.z, at.s, at.inner, at.squares = zeros(at.z), zeros(at.s), 0.0, 0.0
        else:
            at.z = times(-ratio(1.0, math.sqrt(self._option("G") ** 2 + at.squares)), at.s)
        return 1.0


class ProdigyCoordinate(Estimating):
    """Prodigy with a step size per coordinate, in the form of dual averaging: the paper's Algorithm 5.

    The products of vectors in the second and the last line are element by element; ``d`` estimates the largest
    coordinate of ``x0 - x*``, and ``G`` bounds the gradients' largest coordinate.

    ```text
    s_{k+1}   = s_k + d_k^2 g_k
    a_{k+1}^2 = a_k^2 + d_k^2 g_k^2
    d_hat     = sum_{i<=k} d_i^2 <g_i, x0 - x_i> / |s_{k+1}|_1
    d_{k+1}   = max(d_k, d_hat)
    x_{k+1}   = x0 - s_{k+1} / sqrt(d_{k+1}^2 G^2 + a_{k+1}^2)
    average() = sum d_k^2 x_k / sum d_k^2
    ```

    Arguments and errors are those of :class:`ProdigyGD`, but there are no ``weights``.
    """

    VECTORS = (*DUAL, "a2")

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        weight = at.d**2
        at.s = plus(at.s, weight, g)
        at.a2 = plus(at.a2, weight, squared(g))
        at.inner -= weight * dot(g, at.z)
        d = at.estimate(ratio(at.inner, norm1(at.s)))
        roots = torch._foreach_sqrt(torch._foreach_add(at.a2, d**2 * self._option("G") ** 2))
        at.z = [torch.where(root > 0, -s / root, 0.0) for s, root in zip(at.s, roots, strict=True)]
        return weight


class DAdaptGD(Estimating):
    """D-Adaptation in the form of gradient descent, which Prodigy improves on.

    ```text
    eta_k     = d_k / sqrt(G^2 + sum_{i<=k} |g_i|^2)
    x_{k+1}   = x_k - eta_k g_k
    d_hat     = sum_{i<=k} eta_i <g_i, x0 - x_i> / |x_{k+1} - x0|
    d_{k+1}   = max(d_k, d_hat)
    average() = sum eta_k x_k / sum eta_k
    ```

    Arguments and errors are those of :class:`ProdigyGD`, but there are no ``weights``.
    """

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        at.squares += gg
        eta = ratio(at.d, math.sqrt(self._option("G") ** 2 + at.squares))
        at.inner -= eta * dot(g, at.z)
        at.z = plus(at.z, -eta, g)
        at.estimate(ratio(at.inner, norm(at.z)))
        return eta


class DAdaptDA(Estimating):
    """D-Adaptation in the form of dual averaging, which Prodigy improves on.

    ```text
    s_{k+1}   = s_k + d_k g_k
    d_hat     = sum_{i<=k} d_i <g_i, x0 - x_i> / |s_{k+1}|
    d_{k+1}   = max(d_k, d_hat)
    x_{k+1}   = x0 - s_{k+1} / sqrt(G^2 + sum_{i<=k} |g_i|^2)
    average() = sum d_k x_k / sum d_k
    ```

    Arguments and errors are those of :class:`ProdigyGD`, but there are no ``weights``.
    """

    VECTORS = DUAL

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        weight = at.d
        at.s = plus(at.s, weight, g)
        at.inner -= weight * dot(g, at.z)
        at.squares += gg
        at.estimate(ratio(at.inner, norm(at.s)))
        at.z = times(-ratio(1.0, math.sqrt(self._option("G") ** 2 + at.squares)), at.s)
        return weight
