"""The base of the subgradient methods: the start, the displacement from it, the average; a method is a rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Base, Numbers
from .vectors import Vector, dot, plus


@dataclass
class Iterate:
    """Where a method is at iteration k: what its rule reads, and leaves as it is at k + 1. All vectors are float64."""

    x0: Vector
    z: Vector  # x_k - x0
    mean: Vector  # average of x_i - x0, over i < k
    s: Vector  # weighted sum of the gradients, if the rule needs it
    a2: Vector  # the same of the gradients' squares, element by element
    d: float
    d_hat: float = 0.0
    k: int = 0
    inner: float = 0.0  # weighted sum of <g_i, x0 - x_i>
    squares: float = 0.0  # weighted sum of |g_i|^2
    weights: float = 0.0  # sum of the weights of the average
    epoch: int = 0  # number of resets
    loss: Any = field(default=None, repr=False)  # what the closure returned at x_k

    def estimate(self, d_hat: float) -> float:
        """Takes ``d_hat`` for the last estimate, and returns ``d``, the largest so far."""
        self.d_hat, self.d = d_hat, max(self.d, d_hat)
        return self.d


NUMBERS = ("d", "d_hat", "k", "inner", "squares", "weights", "epoch")


class SubgradientMethod(Base):
    """A method for a convex f that is given by subgradients.

    The state is float64 whatever the dtype of the parameters is, and has the displacement ``z = x - x0`` rather than
    ``x``: the parameters are ``x0 + z``, rounded. So a displacement too small to be seen in a parameter is kept, and
    with float32 parameters, and a small ``d0``, the estimate grows as with float64 (the gradients are those of the
    rounded parameters). A change of the parameters from outside moves ``z`` by as much.

    The state takes 24 bytes per element (x0, z, the average), 32 with dual averaging (s), 40 coordinate-wise.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = NUMBERS
    VECTORS: ClassVar[tuple[str, ...]] = ("x0", "z", "mean")

    def _rule(self, at: Iterate, g: Vector, gg: float) -> float:
        """Goes from ``x_k`` to ``x_{k+1}``: binds new values to the fields of ``at``.

        Args:
            at: iteration k.
            g: the subgradient at ``x_k``.
            gg: its squared norm, ``|g|^2``.

        Returns:
            The weight of ``x_k`` in the average.
        """
        raise NotImplementedError

    def _start(self, x0: Vector) -> float:
        """Returns the first estimate."""
        return float(self._option("d0"))

    def _option(self, name: str) -> Any:
        return self.param_groups[0][name]

    @torch.no_grad()
    def average(self) -> Vector:
        """Returns the weighted average of the iterates at which gradients were taken, ``x_0`` to ``x_{k-1}`` after k
        steps: the point that the method's theorem is about.

        Returns:
            A new tensor for each parameter, in their order over all groups, of its shape, dtype and device; before the
            first step, copies of the parameters.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        states = [self.state[p] if p in self.state else {"x0": p, "mean": torch.zeros_like(p)} for p in params]
        return [(own["x0"] + own["mean"]).detach().to(p.dtype) for p, own in zip(params, states, strict=True)]

    # -- the step -----------------------------------------------------------------------------------------------------

    def _take(self, params: list[Tensor], loss: Any) -> None:
        taken = list(zip(self._blocks(params), self._iterates(params), strict=True))
        for block, at in taken:
            g = [torch.zeros_like(x) if p.grad is None else p.grad.double() for p, x in zip(block, at.x0, strict=True)]
            gg, z = dot(g, g), at.z
            self._check_finite(params, gg)
            at.loss = loss
            weight = self._rule(at, g, gg)
            at.weights += weight
            share = weight / at.weights if weight > 0 else 0.0
            at.mean = list(torch._foreach_lerp(at.mean, z, share))
            at.k += 1
            self._check_finite(params, at.d_hat, at.inner, at.squares, at.weights)
        for block, at in taken:
            for i, p in enumerate(block):
                self.state[p] = {name: getattr(at, name)[i] for name in self.VECTORS}
            torch._foreach_copy_(block, torch._foreach_add(at.x0, at.z))
        self._publish([{name: getattr(at, name) for name in NUMBERS} for _, at in taken])

    def _blocks(self, params: list[Tensor]) -> list[Vector]:
        """Returns the parameters of each estimate."""
        return [[p] for p in params] if self.LAYERWISE else [params]

    def _iterates(self, params: list[Tensor]) -> Iterator[Iterate]:
        """Yields where each estimate's parameters are; a parameter without a state starts here."""
        estimates = self.param_groups[0]["estimates"]
        for index, block in enumerate(self._blocks(params)):
            old: dict[str, Any] = {name: [self._kept(p, name) for p in block] for name in self.VECTORS}
            for name in ("s", "a2"):
                old.setdefault(name, [])
            # Exactly 0 unless the parameters were changed from outside.
            rounded = [sum_.to(p.dtype) for p, sum_ in zip(block, plus(old["x0"], 1, old["z"]), strict=True)]
            moved = [p.detach().double() - x.double() for p, x in zip(block, rounded, strict=True)]
            old["z"] = plus(old["z"], 1, moved)
            numbers: dict[str, Any] = estimates[index] if index < len(estimates) else {"d": self._start(old["x0"])}
            yield Iterate(**old, **numbers)

    def _kept(self, p: Tensor, name: str) -> Tensor:
        if p in self.state:
            kept: Tensor = self.state[p][name]
            return kept.to(p.device)
        start = p.detach().to(torch.float64, copy=True)
        return start if name == "x0" else torch.zeros_like(start)

    def _numbers(self) -> list[Numbers]:
        params = [p for group in self.param_groups for p in group["params"]]
        if len(self.param_groups[0]["estimates"]) == len(self._blocks(params)):
            return list(self.param_groups[0]["estimates"])
        return [{name: getattr(at, name) for name in NUMBERS} for at in self._iterates(params)]
