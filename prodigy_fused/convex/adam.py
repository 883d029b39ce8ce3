"""D-Adaptation's Adam, the baseline of the experiments with networks."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..options import Group, number
from .base import DISTANCE, Base, Numbers, Option
from .vectors import Vector, dot, norm1, plus, squared, times

NOT_NEGATIVE = Option("a finite number from 0 up", lambda value: 0 <= number(value) < math.inf, shared=False)
EPS = Option("a positive number", lambda value: 0 < number(value) < math.inf, shared=False)
GROWTH = Option("a number from 1 up", lambda value: number(value) >= 1)
FLAG = Option("True or False", lambda value: isinstance(value, bool))
BETAS = Option(
    "two numbers in [0, 1)",
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(0 <= number(beta) < 1 for beta in value),
)


class DAdaptAdam(Base):
    """D-Adaptation in the form of Adam, with the numbers of the package `dadaptation` 3.2 (`dadapt_adam.py`).

    That is not the D-Adaptation paper's algorithm: there is no ``x0``, and the estimate is of preconditioned sums. One
    step; right-hand sides use the old ``d``, ``v`` and ``s`` unless it says ``_new``, and
    ``dlr = d * lr * bc`` with ``bc = sqrt(1 - beta2^(k+1)) / (1 - beta1^(k+1))``, or 1 without bias correction:

    ```text
    g    <- g + weight_decay * x                        without decouple
    r    <- sqrt(beta2) r + (1 - sqrt(beta2)) dlr <g, s / (sqrt(v) + eps)>
    m    <- beta1 m + (1 - beta1) dlr g
    v    <- beta2 v + (1 - beta2) g^2
    s    <- sqrt(beta2) s + (1 - sqrt(beta2)) dlr g
    d_hat = r / ((1 - sqrt(beta2)) |s_new|_1)
    d    <- max(d, min(d_hat, growth_rate * d))
    x    <- x - weight_decay * dlr * x                  with decouple
    x    <- x - m_new / (sqrt(v_new) + eps)
    ```

    The state (s, m, v) has the parameters' dtype, or float32 where that is of 16 bits. While ``s`` is zero there is no
    step, as there. Unlike there, gradients are not written to, a group with ``lr = 0`` is not touched, a gradient that
    is not finite raises, and ``layer_scale`` and sharding are not supported. There is no ``average()``: no theorem.

    Args:
        params: the parameters, or groups of them; float64, float32, or 16 bits; any shapes. Groups may have ``lr``
            (one for all, or 0), ``eps`` and ``weight_decay`` of their own.
        lr: a factor of the step size, for schedulers.
        betas: decays of ``m`` and ``v``, and by the root of the second, of ``s`` and ``r``; in [0, 1).
        eps: is added to the root of ``v``, in the gradients' unit.
        weight_decay: the factor of ``x`` that is added to the gradient or, with ``decouple``, to the step.
        decouple: whether weight decay is AdamW's.
        use_bias_correction: whether ``bc`` is not 1.
        d0: the first estimate.
        growth_rate: the largest factor by which ``d`` grows in a step, from 1 up.

    Raises:
        ValueError: an argument out of range, which is named, or a parameter that cannot be optimized.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {
        "lr": NOT_NEGATIVE,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": NOT_NEGATIVE,
        "decouple": FLAG,
        "use_bias_correction": FLAG,
        "d0": DISTANCE,
        "growth_rate": GROWTH,
    }
    NUMBERS = ("d", "d_hat", "k", "r")
    VECTORS = ("s", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = math.inf,
    ) -> None:
        options = (lr, betas, eps, weight_decay, decouple, use_bias_correction, d0, growth_rate)
        super().__init__(params, dict(zip(self.OPTIONS, options, strict=True)))

    def _numbers(self) -> list[Numbers]:
        first = self.param_groups[0]
        return first["estimates"] or [{"d": first["d0"], "d_hat": 0.0, "k": 0, "r": 0.0}]

    def _needs_state(self) -> bool:
        return False

    def _take(self, params: list[Tensor], loss: Any) -> None:
        old, first = self._numbers()[0], self.param_groups[0]
        (beta1, beta2), lr = first["betas"], self._only_lr()
        k, decay = old["k"] + 1, math.sqrt(beta2)
        bc = math.sqrt(1 - beta2**k) / (1 - beta1**k) if first["use_bias_correction"] else 1.0
        dlr = old["d"] * lr * bc
        moving = [group for group in self.param_groups if group["lr"] > 0]
        updates = [each for group in moving if (each := _Update.of(group, self.state)).params]
        r = decay * old["r"] + (1 - decay) * sum(each.advance(dlr, beta1, beta2) for each in updates)
        s = sum(norm1(each.s) for each in updates)
        self._check_finite(params, r, s)
        if s == 0:
            return
        d_hat = r / ((1 - decay) * s)
        d = max(old["d"], min(d_hat, first["growth_rate"] * old["d"]))
        for each in updates:
            each.write(self.state, dlr, first["decouple"])
        self._publish([{"d": d, "d_hat": d_hat, "k": k, "r": r}])

    def _only_lr(self) -> float:
        lrs = {float(group["lr"]) for group in self.param_groups} - {0.0}
        if len(lrs) > 1:
            raise ValueError(f"Invalid lr: {sorted(lrs)}: groups must have the same, or 0")
        return lrs.pop() if lrs else 0.0


class _Update:
    """One group's vectors during a step."""

    def __init__(self, group: Group, params: Vector, s: Vector, m: Vector, v: Vector) -> None:
        self.group, self.params, self.s, self.m, self.v = group, params, s, m, v

    @classmethod
    def of(cls, group: Group, states: Any) -> _Update:
        """Returns the update of the parameters that have a gradient."""
        params = [p for p in group["params"] if p.grad is not None]
        blank = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        kept = [[states[p][key].to(p.device) if p in states else zero for p, zero in zip(params, blank, strict=True)]
                for key in DAdaptAdam.VECTORS]  # fmt: skip
        return cls(group, params, *kept)

    def advance(self, dlr: float, beta1: float, beta2: float) -> float:
        """Binds the new s, m and v, and returns the sum of ``dlr <g, s / (sqrt(v) + eps)>`` with the old ones."""
        g = [p.grad.to(s.dtype) for p, s in zip(self.params, self.s, strict=True) if p.grad is not None]
        if self.group["weight_decay"] > 0 and not self.group["decouple"]:
            g = plus(g, self.group["weight_decay"], [p.to(s.dtype) for p, s in zip(self.params, self.s, strict=True)])
        inner = dot(g, list(torch._foreach_div(self.s, self._root())))
        decay = math.sqrt(beta2)
        self.m = plus(times(beta1, self.m), dlr * (1 - beta1), g)
        self.v = plus(times(beta2, self.v), 1 - beta2, squared(g))
        self.s = plus(times(decay, self.s), dlr * (1 - decay), g)
        return dlr * inner

    def write(self, states: Any, dlr: float, decouple: bool) -> None:
        """Writes the parameters and their state."""
        x = [p.to(s.dtype) for p, s in zip(self.params, self.s, strict=True)]
        if decouple and self.group["weight_decay"] > 0:
            x = times(1 - self.group["weight_decay"] * dlr, x)
        torch._foreach_copy_(self.params, torch._foreach_addcdiv(x, self.m, self._root(), value=-1))
        for p, *vectors in zip(self.params, self.s, self.m, self.v, strict=True):
            states[p] = dict(zip(DAdaptAdam.VECTORS, vectors, strict=True))

    def _root(self) -> Vector:
        return list(torch._foreach_add(torch._foreach_sqrt(self.v), self.group["eps"]))
