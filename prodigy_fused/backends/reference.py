"""Prodigy as a loop over tensors, to be read next to docs/algorithm.md, Algorithm 4. Exact, not fast."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..estimate import FIELDS, advance
from ..hyper import Hyper
from ..options import Group
from ..step import Slot, Step
from ..sums import stable_sum
from ..tensors import sampled
from .elementwise import TensorPlan, apply_step, arithmetic, bias_correction, current_x, store_state

COMPILED = ONE_PASS = READS_DEVICE = False


def missing(device: torch.device) -> str | None:
    """Returns None: nothing has to be installed."""
    return None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns None: takes every tensor the optimizer takes."""
    return None


class ReferencePlan(TensorPlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def _active(self, step: Step) -> Iterator[tuple[Slot, Tensor, Hyper]]:
        for slot, grad in zip(self.slots, self._grads, strict=True):
            h = step.hypers[slot.group]
            if grad is not None and h.lr > 0:
                yield slot, _gradient(slot, grad, h, float(step.grad_scale)), h

    def update(self, step: Step) -> None:
        old = dict(zip(FIELDS, step.row.tolist(), strict=True))
        d, d0, beta3 = old["d"], step.estimate.d0, step.estimate.beta3
        dots, norms = [], []
        for slot, g, h in self._active(step):
            state, lr, bc = slot.state, float(h.lr), bias_correction(h, old["k"])
            dlr = d * lr * bc
            v, s = state["exp_avg_sq"].to(g.dtype), state["s"].to(g.dtype)

            distance = _distance(slot)
            dots.append(lr * bc * stable_sum(sampled(g, slot.slice_p) * distance).item())
            g = g.nan_to_num(0.0, 0.0, 0.0)  # the sum above still carries the NaN; the state must stay finite

            if h.beta1 > 0:
                m = state["exp_avg"].to(g.dtype)
                store_state(slot, "exp_avg", h.beta1 * m + (1 - h.beta1) * d * g, old["k"])
            store_state(slot, "exp_avg_sq", h.beta2 * v + (1 - h.beta2) * (d * g) * (d * g), old["k"])
            weight = d / d0 * (d if h.safeguard_warmup else dlr)
            s = beta3 * s + weight * sampled(g, slot.slice_p)
            store_state(slot, "s", s, old["k"])
            norms.append(stable_sum(s.abs()).item())
        # Exactly rounded, so that the order of the tensors does not matter.
        self.sums.copy_(torch.tensor([_total(dots), _total(norms)], dtype=torch.float64, device=self.sums.device))

    def finish(self, step: Step, last: bool) -> None:
        row = advance(step.row, step.sums, step.estimate)
        old, new = (dict(zip(FIELDS, r.tolist(), strict=True)) for r in (step.row, row))
        if new["k"] > old["k"]:
            for slot, g, h in self._active(step):
                state, x = slot.state, current_x(slot)
                dlr = old["d"] * float(h.lr) * bias_correction(h, old["k"])
                m = state["exp_avg"].to(g.dtype) if h.beta1 > 0 else new["d"] * g.nan_to_num(0.0, 0.0, 0.0)
                decay = h.weight_decay * dlr if h.decouple else 0.0
                denominator = state["exp_avg_sq"].to(g.dtype).sqrt() + new["d"] * h.eps
                apply_step(slot, decay * x + dlr * (m / denominator), old["k"])
        if last:
            step.row.copy_(row)


def _gradient(slot: Slot, grad: Tensor, h: Hyper, grad_scale: float) -> Tensor:
    """Returns ``g`` of the minimised objective in the arithmetic's precision, with coupled weight decay."""
    g = grad.to(arithmetic(slot.param)) / (-grad_scale if h.maximize else grad_scale)
    return g if h.decouple else g + h.weight_decay * current_x(slot)


def _distance(slot: Slot) -> Tensor:
    """Returns ``x0 - x`` at the sampled positions."""
    x = current_x(slot)
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
