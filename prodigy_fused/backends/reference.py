"""Prodigy as a loop over tensors, to be read next to docs/algorithm.md, Algorithm 4. Exact, not fast."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..hyper import Hyper
from ..options import Group
from ..step import Slot, Step
from ..sums import stable_sum
from ..tensors import check_gradient, is_fake
from .elementwise import (
    TensorPlan,
    apply_step,
    arithmetic,
    bias_correction,
    current_x,
    finite_or_zero,
    load_state,
    store_state,
)

COMPILED = ONE_PASS = READS_DEVICE = False


def missing(device: torch.device) -> str | None:
    """Returns None: nothing has to be installed."""
    return None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns why this backend cannot take the parameter, and the remedy; None if it can."""
    if is_fake(p):
        return "it reads numbers, which tensors under FakeTensorMode do not have: use foreach=True or fused=None"
    return None


class ReferencePlan(TensorPlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def _active(self, step: Step) -> Iterator[tuple[Slot, Tensor, Hyper]]:
        for slot, grad in zip(self.slots, self._grads, strict=True):
            if grad is not None and step.hypers[slot.group].lr > 0:
                yield slot, grad, step.hypers[slot.group]

    def begin(self, step: Step) -> None:
        self._terms: list[tuple[list[float], list[float]]] = [([], []) for _ in step.rows]  # <g, x0 - x> and |s|
        self._rows = [dict(zip(FIELDS, row, strict=True)) for row in step.rows.tolist()]

    def update(self, step: Step) -> None:
        self.begin(step)
        for slot, grad, h in self._active(step):
            self._update_slot(step, slot, grad, h)
        self.add_up(step)

    def update_one(self, step: Step, at: int, grad: Tensor) -> None:
        slot = self.slots[at]
        check_gradient(slot.index, slot.param, grad)
        if step.hypers[slot.group].lr > 0:
            self._update_slot(step, slot, grad, step.hypers[slot.group])

    def _update_slot(self, step: Step, slot: Slot, grad: Tensor, h: Hyper) -> None:
        g = _gradient(slot, grad, h, float(step.grad_scale))
        old, options = self._rows[slot.estimate], step.options[slot.group]
        dots, norms = self._terms[slot.estimate]
        d, lr, bc = old["d"], float(h.lr), bias_correction(h, old["k"])
        dlr = d * lr * bc
        if not slot.frozen:
            dots.append(lr * bc * stable_sum(_products(slot, slot.sampled(g))).item())
        g = finite_or_zero(g)  # the sum above still carries the NaN; the state must stay finite

        if h.beta1 > 0:
            m = load_state(slot, "exp_avg", g.dtype)
            store_state(slot, "exp_avg", h.beta1 * m + (1 - h.beta1) * d * g, old["k"])
        v = load_state(slot, "exp_avg_sq", g.dtype)
        store_state(slot, "exp_avg_sq", h.beta2 * v + (1 - h.beta2) * (d * g) * (d * g), old["k"])
        if not slot.frozen:
            weight = d / options.d0 * (d if h.safeguard_warmup else dlr)
            s = options.beta3 * load_state(slot, "s", g.dtype) + weight * slot.sampled(g)
            store_state(slot, "s", s, old["k"])
            norms.append(stable_sum(s.abs()).item())

    def add_up(self, step: Step) -> None:
        # Exactly rounded, so that the order of the tensors does not matter.
        totals = [list(map(_total, both)) for both in self._terms]
        self.sums.copy_(torch.tensor(totals, dtype=torch.float64, device=self.sums.device))

    def finish(self, step: Step, last: bool) -> None:
        advanced = step.advanced()
        before, after = (
            [dict(zip(FIELDS, row, strict=True)) for row in rows.tolist()] for rows in (step.rows, advanced)
        )
        for slot, grad, h in self._active(step):
            g = _gradient(slot, grad, h, float(step.grad_scale))
            old, new = before[slot.estimate], after[slot.estimate]
            if new["k"] == old["k"]:
                continue
            x = current_x(slot)
            dlr = old["d"] * float(h.lr) * bias_correction(h, old["k"])
            m = load_state(slot, "exp_avg", g.dtype) if h.beta1 > 0 else new["d"] * finite_or_zero(g)
            decay = h.weight_decay * dlr if h.decouple else 0.0
            denominator = load_state(slot, "exp_avg_sq", g.dtype).sqrt() + new["d"] * h.eps
            apply_step(slot, decay * finite_or_zero(x) + dlr * (m / denominator), old["k"])
        if last:
            step.new_rows.copy_(advanced)


def _gradient(slot: Slot, grad: Tensor, h: Hyper, grad_scale: float) -> Tensor:
    """Returns ``g`` of the minimised objective in the arithmetic's precision, with coupled weight decay."""
    g = grad.to(arithmetic(slot.param)) / (-grad_scale if h.maximize else grad_scale)
    return g if h.decouple else g + h.weight_decay * finite_or_zero(current_x(slot))


def _products(slot: Slot, g: Tensor) -> Tensor:
    """Returns ``g * (x0 - x)`` at the sampled positions: 0 where g is, also if x or x0 is not finite there."""
    return torch.where(g == 0, 0.0, g * _distance(slot))


def _distance(slot: Slot) -> Tensor:
    """Returns ``x0 - x`` at the sampled positions."""
    if slot.moves_in_codes:
        return -load_state(slot, "delta", torch.float32)
    x = current_x(slot)
    if slot.low_precision == "displacement":
        delta: Tensor = slot.state["delta"]
        return -delta
    x0: Tensor = slot.state["p0"].to(x.dtype)
    return x0 - slot.sampled(x)


def _total(terms: list[float]) -> float:
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        return math.nan


make_plan = ReferencePlan
