"""Methods that measure the distance, or are told it: DoG, DoWG, L-DoG, and what came before them.

M. Ivgi, O. Hinder, Y. Carmon, *DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule*, ICML 2023
(arXiv 2302.12022); A. Khaled, K. Mishchenko, C. Jin, *DoWG Unleashed: An Efficient Universal Parameter-Free Gradient
Descent Method*, NeurIPS 2023 (arXiv 2305.16284).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ..options import number
from .base import DISTANCE, Option
from .subgradient import Iterate, SubgradientMethod
from .vectors import Vector, norm, plus, ratio

RELATIVE = 1e-6  # of 1 + |x0|: DoG's rule for the first distance
FIRST = Option(f"None, or {DISTANCE.wanted}", lambda value: value is None or DISTANCE.valid(value))
FINITE = Option("a finite number", lambda value: math.isfinite(number(value)))


class DoG(SubgradientMethod):
    """Distance over gradients.

    ```text
    d_k       = max(d0, max_{i<=k} |x_i - x0|)
    eta_k     = d_k / sqrt(sum_{i<=k} |g_i|^2)
    x_{k+1}   = x_k - eta_k g_k
    average() = sum d_k x_k / sum d_k
    ```

    Without the small number that the package `dog-optimizer` adds to the sum.

    Args:
        params: the parameters, or groups of them; float64, float32, or 16 bits; any shapes.
        d0: the first distance, in the parameters' unit, from 1e-100 to 1e100; None for ``1e-6 * (1 + |x0|)``.

    Raises:
        ValueError: an argument out of range, which is named, or a parameter that cannot be optimized.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {"d0": FIRST}

    def __init__(self, params: Any, d0: float | None = None) -> None:
        super().__init__(params, {"d0": d0})

    def _start(self, x0: Vector) -> float:
        d0: float | None = self._option("d0")
        return RELATIVE * (1 + norm(x0)) if d0 is None else d0

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        weight = at.d
        at.squares += gg
        at.z = plus(at.z, -ratio(weight, math.sqrt(at.squares)), g)
        at.estimate(norm(at.z))
        return weight


class LDoG(DoG):
    """DoG for each parameter by itself, as its paper recommends for networks: ``d_k``, the sum of ``|g_i|^2`` and the
    average's weights are each parameter's own, and so is ``1 + |x0|`` in the first distance. No theorem.

    ``opt.d`` is the norm of the parameters' distances. Arguments and errors are those of :class:`DoG`; each parameter
    starts with ``d0``.
    """

    LAYERWISE = True


class DoWG(DoG):
    """Distance over weighted gradients.

    ```text
    d_k       = max(d0, max_{i<=k} |x_i - x0|)
    eta_k     = d_k^2 / sqrt(sum_{i<=k} d_i^2 |g_i|^2)
    x_{k+1}   = x_k - eta_k g_k
    average() = sum d_k^2 x_k / sum d_k^2
    ```

    Arguments and errors are those of :class:`DoG`.
    """

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        weight = at.d**2
        at.squares += weight * gg
        at.z = plus(at.z, -ratio(weight, math.sqrt(at.squares)), g)
        at.estimate(norm(at.z))
        return weight


class Told(SubgradientMethod):
    """A method that is told the distance, and so is not parameter-free."""

    OPTIONS: ClassVar[dict[str, Option]] = {"D": DISTANCE}

    def __init__(self, params: Any, D: float = 1.0) -> None:
        super().__init__(params, {"D": D})

    def _start(self, x0: Vector) -> float:
        return float(self._option("D"))


class AdagradNorm(Told):
    """Adagrad with one step size (Streeter and McMahan 2010; Ward, Wu and Bottou 2019).

    ```text
    x_{k+1}   = x_k - eta_k g_k,  eta_k = D / sqrt(sum_{i<=k} |g_i|^2)
    average() = sum eta_k x_k / sum eta_k
    ```

    Args:
        params: the parameters, or groups of them; float64, float32, or 16 bits; any shapes.
        D: the distance ``|x0 - x*|``, or a guess, in the parameters' unit, from 1e-100 to 1e100; ``opt.d`` is it.

    Raises:
        ValueError: an argument out of range, which is named, or a parameter that cannot be optimized.
    """

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        at.squares += gg
        eta = ratio(at.d, math.sqrt(at.squares))
        at.z = plus(at.z, -eta, g)
        return eta


class NormalizedSubgradient(Told):
    """The normalised subgradient method with the step length ``D / sqrt(k)`` (Shor 1964; Nesterov 2004, 3.2.3).

    ```text
    x_{k+1}   = x_k - eta_k g_k,  eta_k = D / (sqrt(k + 1) |g_k|),  k = 0, 1, ...
    average() = sum eta_k x_k / sum eta_k
    ```

    Where ``g_k`` is 0, ``x_k`` is a solution: it stays, and its weight is made of the last norm that was not 0.
    Arguments and errors are those of :class:`AdagradNorm`.
    """

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        at.squares = gg or at.squares
        eta = ratio(at.d, math.sqrt((at.k + 1) * at.squares))
        at.z = plus(at.z, -eta, g)
        return eta


class Polyak(SubgradientMethod):
    """Polyak's step (1969), for a known minimum. There is no estimate: ``opt.d`` is 0.

    ```text
    x_{k+1}   = x_k - eta_k g_k,  eta_k = (f(x_k) - f_star) / |g_k|^2, 0 if negative
    average() = the unweighted average of all x_k
    ```

    ``step(closure)`` needs the closure, which returns ``f(x_k)``: ``ValueError`` without it, or if that is not finite.

    Args:
        params: the parameters, or groups of them; float64, float32, or 16 bits; any shapes.
        f_star: the minimum of f, in its unit.

    Raises:
        ValueError: an argument out of range, which is named, or a parameter that cannot be optimized.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {"f_star": FINITE}

    def __init__(self, params: Any, f_star: float = 0.0) -> None:
        super().__init__(params, {"f_star": f_star})

    def _start(self, x0: Vector) -> float:
        return 0.0

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        loss = number(at.loss)
        if not math.isfinite(loss):
            raise ValueError(f"Invalid closure: it returned {at.loss!r}: Polyak's step needs step(closure), the loss")
        eta = ratio(max(0.0, loss - self._option("f_star")), gg)
        at.z = plus(at.z, -eta, g)
        return 1.0
