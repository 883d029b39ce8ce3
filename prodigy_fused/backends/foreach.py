"""Prodigy in ``torch._foreach_*`` operations: any device PyTorch has, and no value read back to the host.

The order is Algorithm 4's own: ``update`` makes m, v, s and the sums, ``finish`` makes x with d_new. That is more
passes over memory than a compiled backend takes, but every launch covers a whole run of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..estimate import FIELDS, advance, stable_sum
from ..hyper import Hyper, bias_correction
from ..low_precision import arithmetic, keep, move, position
from ..step import ReadsSlots, Slot, Step
from ..tensors import sampled

# Temporaries of one run hold at most this many elements (a single larger tensor is a run of its own), so that peak
# memory does not grow with the model. On a CPU, where an operation costs no launch, they stay in its cache: with
# tensors of 100,000 that is three times faster than temporaries for which the system must find, and clear, new pages.
RUN_ELEMENTS, RUN_ELEMENTS_ON_CPU = 1 << 24, 1 << 16


def unsupported(p: Tensor, group: dict[str, Any]) -> str | None:
    """None: takes every tensor the optimizer takes."""
    return None


@dataclass
class Run:
    """Consecutive tensors of one group that are stepped together."""

    slots: list[Slot]
    grads: list[Tensor]
    h: Hyper

    def states(self, key: str) -> list[Tensor]:
        """In the arithmetic's precision: copies where they are stored in another."""
        return [slot.state[key].to(arithmetic(slot.param)) for slot in self.slots]

    def keep(self, key: str, values: list[Tensor], k: Tensor) -> None:
        """Stores what :meth:`states` gave and was changed since."""
        for slot, value in zip(self.slots, values, strict=True):
            keep(slot, key, value, k)

    def distances(self) -> list[Tensor]:
        """``x0 - x``, new tensors, at the sampled positions."""
        xs = [position(slot) for slot in self.slots]  # brings delta up to date
        if self.slots[0].low_precision == "displacement":
            return list(torch._foreach_neg([slot.state["delta"] for slot in self.slots]))
        xs = self.sampled(xs)
        p0s = [slot.state["p0"].to(x.dtype).expand_as(x) for slot, x in zip(self.slots, xs, strict=True)]
        return list(torch._foreach_sub(p0s, xs))

    def sampled(self, tensors: list[Tensor]) -> list[Tensor]:
        return [sampled(t, slot.slice_p) for t, slot in zip(tensors, self.slots, strict=True)]

    def gradients(self, grad_scale: float) -> list[Tensor]:
        """``g``, new tensors in the arithmetic's dtype: unscaled, of the minimised objective, coupled decay added."""
        sign = -1.0 if self.h.maximize else 1.0
        wide = [g.to(arithmetic(slot.param)) for slot, g in zip(self.slots, self.grads, strict=True)]
        gs = torch._foreach_mul(wide, sign / grad_scale)
        if self.h.weight_decay and not self.h.decouple:
            torch._foreach_add_(gs, [position(slot) for slot in self.slots], alpha=self.h.weight_decay)
        return list(gs)


def without_nonfinite(gs: list[Tensor]) -> list[Tensor]:
    return [g.nan_to_num_(0.0, 0.0, 0.0) for g in gs]


class ForeachPlan(ReadsSlots):
    """The contract of :class:`prodigy_fused.step.Plan`."""

    def _runs(self, grads: list[Tensor | None], step: Step) -> Iterator[Run]:
        run, elements = None, 0
        most = RUN_ELEMENTS_ON_CPU if self.sums.is_cpu else RUN_ELEMENTS
        for slot, grad in zip(self.slots, grads, strict=True):
            h = step.hypers[slot.group]
            if grad is None or h.lr == 0 or grad.numel() == 0:
                continue
            if run is None or run.slots[0].group != slot.group or elements + grad.numel() > most:
                if run is not None:
                    yield run
                run, elements = Run([], [], h), 0
            run.slots.append(slot)
            run.grads.append(grad)
            elements += grad.numel()
        if run is not None:
            yield run

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        dots: list[Tensor] = []
        norms: list[Tensor] = []
        for run in self._runs(grads, step):
            _update_run(run, step, dots, norms)
        # Sorted, so that the order of the tensors does not matter.
        self.sums.copy_(torch.stack([_total(dots, self.sums), _total(norms, self.sums)]))

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        row = advance(step.row, step.sums, step.shared)
        for run in self._runs(grads, step):
            _step_run(run, step, row)
        if last:
            step.row.copy_(row)


def _update_run(run: Run, step: Step, dots: list[Tensor], norms: list[Tensor]) -> None:
    h, old = run.h, dict(zip(FIELDS, step.row, strict=True))
    d, bc = old["d"], bias_correction(h, old["k"])
    gs, vs, ss = run.gradients(step.grad_scale), run.states("exp_avg_sq"), run.states("s")

    distances = run.distances()
    torch._foreach_mul_(distances, run.sampled(gs))
    dots += [h.lr * bc * stable_sum(t) for t in distances]
    del distances
    without_nonfinite(gs)  # the sum above still tells; the state stays finite

    weight = d / step.shared.d0 * (d if h.safeguard_warmup else d * h.lr * bc)
    torch._foreach_mul_(ss, step.shared.beta3)
    torch._foreach_add_(ss, torch._foreach_mul(run.sampled(gs), weight))
    run.keep("s", ss, old["k"])
    norms += [stable_sum(t) for t in torch._foreach_abs(ss)]

    torch._foreach_mul_(gs, d)
    if h.beta1 > 0:
        ms = run.states("exp_avg")
        torch._foreach_mul_(ms, h.beta1)
        torch._foreach_add_(ms, gs, alpha=1 - h.beta1)
        run.keep("exp_avg", ms, old["k"])
    torch._foreach_mul_(vs, h.beta2)
    torch._foreach_addcmul_(vs, gs, gs, value=1 - h.beta2)
    run.keep("exp_avg_sq", vs, old["k"])


def _step_run(run: Run, step: Step, row: Tensor) -> None:
    h = run.h
    old, new = (dict(zip(FIELDS, r, strict=True)) for r in (step.row, row))
    counts = new["k"] - old["k"]  # 0 while every gradient has been zero: x stays
    dlr = counts * old["d"] * h.lr * bias_correction(h, old["k"])

    if h.beta1 > 0:
        ms = run.states("exp_avg")
    else:
        ms = without_nonfinite(run.gradients(step.grad_scale))
        torch._foreach_mul_(ms, new["d"])
    denominators = torch._foreach_sqrt(run.states("exp_avg_sq"))
    torch._foreach_add_(denominators, new["d"] * h.eps)
    steps = torch._foreach_div(ms, denominators)
    del denominators
    torch._foreach_mul_(steps, dlr)
    if h.weight_decay and h.decouple:
        xs = [position(slot) for slot in run.slots]
        torch._foreach_add_(steps, torch._foreach_mul(xs, h.weight_decay * dlr))
    if run.slots[0].low_precision is None:
        torch._foreach_sub_([slot.param for slot in run.slots], steps)
        return
    for slot, step_of_x in zip(run.slots, steps, strict=True):
        move(slot, step_of_x, old["k"])


def _total(terms: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(terms).sort().values.sum() if terms else torch.zeros_like(like[0])


make_plan = ForeachPlan
