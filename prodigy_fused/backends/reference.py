"""Prodigy as a loop over tensors, to be read next to ALGORITHM.md, Algorithm 4. Exact, not fast."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..estimate import FIELDS, advance, stable_sum
from ..hyper import Hyper, bias_correction
from ..low_precision import arithmetic, keep, move, position
from ..step import ReadsSlots, Slot, Step
from ..tensors import sampled


def unsupported(p: Tensor, group: dict[str, Any]) -> str | None:
    """None: takes every tensor the optimizer takes."""
    return None


class ReferencePlan(ReadsSlots):
    """The contract of :class:`prodigy_fused.step.Plan`."""

    def _active(self, grads: list[Tensor | None], step: Step) -> Iterator[tuple[Slot, Tensor, Hyper]]:
        for slot, grad in zip(self.slots, grads, strict=True):
            h = step.hypers[slot.group]
            if grad is not None and h.lr > 0:
                yield slot, _gradient(slot, grad, h, step.grad_scale), h

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        old = dict(zip(FIELDS, step.row.tolist(), strict=True))
        d, d0, beta3 = old["d"], step.shared.d0, step.shared.beta3
        dots, norms = [], []
        for slot, g, h in self._active(grads, step):
            state, bc = slot.state, bias_correction(h, old["k"])
            dlr = d * h.lr * bc
            v, s = state["exp_avg_sq"].to(g.dtype), state["s"].to(g.dtype)

            distance = _distance(slot)
            dots.append(h.lr * bc * stable_sum(sampled(g, slot.slice_p) * distance).item())
            g = g.nan_to_num(0.0, 0.0, 0.0)  # the sum above still tells; the state stays finite

            if h.beta1 > 0:
                m = state["exp_avg"].to(g.dtype)
                keep(slot, "exp_avg", h.beta1 * m + (1 - h.beta1) * d * g, old["k"])
            keep(slot, "exp_avg_sq", h.beta2 * v + (1 - h.beta2) * (d * g) * (d * g), old["k"])
            weight = d / d0 * (d if h.safeguard_warmup else dlr)
            s = beta3 * s + weight * sampled(g, slot.slice_p)
            keep(slot, "s", s, old["k"])
            norms.append(stable_sum(s.abs()).item())
        # Exactly rounded, so that the order of the tensors does not matter.
        self.sums.copy_(torch.tensor([_total(dots), _total(norms)], dtype=torch.float64, device=self.sums.device))

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        row = advance(step.row, step.sums, step.shared)
        old, new = (dict(zip(FIELDS, r.tolist(), strict=True)) for r in (step.row, row))
        if new["k"] > old["k"]:
            for slot, g, h in self._active(grads, step):
                state, x = slot.state, position(slot)
                dlr = old["d"] * h.lr * bias_correction(h, old["k"])
                m = state["exp_avg"].to(g.dtype) if h.beta1 > 0 else new["d"] * g.nan_to_num(0.0, 0.0, 0.0)
                decay = h.weight_decay * dlr if h.decouple else 0.0
                denominator = state["exp_avg_sq"].to(g.dtype).sqrt() + new["d"] * h.eps
                move(slot, decay * x + dlr * (m / denominator), old["k"])
        if last:
            step.row.copy_(row)


def _gradient(slot: Slot, grad: Tensor, h: Hyper, grad_scale: float) -> Tensor:
    """``g``: the true gradient of the minimised objective, in the arithmetic's precision, with coupled weight decay."""
    g = grad.to(arithmetic(slot.param)) / (-grad_scale if h.maximize else grad_scale)
    return g if h.decouple else g + h.weight_decay * position(slot)


def _distance(slot: Slot) -> Tensor:
    """``x0 - x`` at the sampled positions."""
    x = position(slot)
    if slot.low_precision == "displacement":
        delta: Tensor = slot.state["delta"]
        return -delta
    x0: Tensor = slot.state["p0"].to(x.dtype)
    return x0 - sampled(x, slot.slice_p)


def _total(terms: list[float]) -> float:
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        return math.nan


make_plan = ReferencePlan
