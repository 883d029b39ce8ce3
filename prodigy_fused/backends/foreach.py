"""Prodigy in ``torch._foreach_*`` operations: any device PyTorch has, and no value read back to the host.

The order is Algorithm 4's own: ``update`` computes m, v, s and the sums, ``finish`` computes x with d_new. That is more
passes over memory than a compiled backend needs, but every launch covers a whole run of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..hyper import Hyper
from ..options import Group
from ..step import Slot, Step
from ..sums import stable_sum
from ..tensors import is_fake
from .elementwise import TensorPlan, apply_step, arithmetic, bias_correction, current_x, finite_or_zero, store_state

COMPILED = ONE_PASS = READS_DEVICE = False
# Temporaries of one run hold at most this many elements (a single larger tensor is a run of its own), so that peak
# memory does not grow with the model. On a CPU, where an operation costs no launch, they stay in its cache: on an EPYC
# with tensors of 100,000 that is three times faster than temporaries which the system must page in and zero.
RUN_ELEMENTS, RUN_ELEMENTS_ON_CPU = 1 << 24, 1 << 16


def missing(device: torch.device) -> str | None:
    """Returns None: nothing has to be installed."""
    return None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns None: takes every tensor the optimizer takes."""
    return None


@dataclass
class Run:
    """Consecutive tensors of one group that are stepped together."""

    slots: list[Slot]
    grads: list[Tensor]
    h: Hyper

    @property
    def lr(self) -> float:
        """The group's learning rate."""
        return float(self.h.lr)

    @property
    def estimate(self) -> int:
        """The index of the group's estimate."""
        return self.slots[0].estimate

    @property
    def frozen(self) -> bool:
        """Whether the estimate is fixed, and the state has no samples."""
        return self.slots[0].frozen

    def states(self, key: str) -> list[Tensor]:
        """Returns state tensors in the arithmetic's precision: copies if they are stored in another."""
        return [slot.state[key].to(arithmetic(slot.param)) for slot in self.slots]

    def store(self, key: str, values: list[Tensor], k: Tensor) -> None:
        """Stores tensors that :meth:`states` returned and that were changed since."""
        for slot, value in zip(self.slots, values, strict=True):
            store_state(slot, key, value, k)

    def distances(self) -> list[Tensor]:
        """Returns ``x0 - x`` at the sampled positions, new tensors."""
        xs = [current_x(slot) for slot in self.slots]  # resets a delta that no longer fits
        if self.slots[0].low_precision == "displacement":
            return list(torch._foreach_neg([slot.state["delta"] for slot in self.slots]))
        xs = self.sampled(xs)
        p0s = [slot.state["p0"].to(x.dtype).expand_as(x) for slot, x in zip(self.slots, xs, strict=True)]
        return list(torch._foreach_sub(p0s, xs))

    def sampled(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the elements of ``tensors``, one per slot, at the sampled positions."""
        return [slot.sampled(t) for t, slot in zip(tensors, self.slots, strict=True)]

    def gradients(self, grad_scale: float) -> list[Tensor]:
        """Returns ``g``, new tensors in the arithmetic's dtype: unscaled, of the minimised objective, with coupled
        weight decay."""
        sign = -1.0 if self.h.maximize else 1.0
        wide = [g.to(arithmetic(slot.param)) for slot, g in zip(self.slots, self.grads, strict=True)]
        gs = torch._foreach_mul(wide, sign / grad_scale)
        if self.h.weight_decay and not self.h.decouple:
            xs = [finite_or_zero(current_x(slot)) for slot in self.slots]
            torch._foreach_add_(gs, xs, alpha=self.h.weight_decay)
        return list(gs)


def without_nonfinite(gs: list[Tensor]) -> list[Tensor]:
    """Sets elements that are not finite to 0, in place."""
    return [g.nan_to_num_(0.0, 0.0, 0.0) for g in gs]


class ForeachPlan(TensorPlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def runs(self, step: Step) -> Iterator[Run]:
        """Yields the tensors that have a gradient and a learning rate, in runs of one group each."""
        run, elements = None, 0
        most = RUN_ELEMENTS_ON_CPU if self.sums.is_cpu else RUN_ELEMENTS
        for slot, grad in zip(self.slots, self._grads, strict=True):
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

    def update(self, step: Step) -> None:
        dots: list[list[Tensor]] = [[] for _ in step.rows]
        norms: list[list[Tensor]] = [[] for _ in step.rows]
        for run in self.runs(step):
            self.update_run(run, step, dots[run.estimate], norms[run.estimate])
        # Sorted, so that the order of the tensors does not matter.
        zero = self.sums.new_zeros(())
        totals = [torch.stack([_total(dot, zero), _total(norm, zero)]) for dot, norm in zip(dots, norms, strict=True)]
        self.sums.copy_(torch.stack(totals))

    def finish(self, step: Step, last: bool) -> None:
        new_rows = step.advanced()
        for run in self.runs(step):
            self.step_run(run, step, new_rows)
        if last:
            step.new_rows.copy_(new_rows)

    @staticmethod
    def update_run(run: Run, step: Step, dots: list[Tensor], norms: list[Tensor]) -> None:
        """Updates m, v and s of a run, and appends each tensor's part of its estimate's two sums."""
        h, options = run.h, step.options[run.slots[0].group]
        old = dict(zip(FIELDS, step.rows[run.estimate], strict=True))
        d, bc = old["d"], bias_correction(h, old["k"])
        gs, vs = run.gradients(float(step.grad_scale)), run.states("exp_avg_sq")

        if not run.frozen:
            distances = run.distances()
            samples = run.sampled(gs)
            torch._foreach_mul_(distances, samples)
            # Where g is 0, x or x0 need not be finite.
            dots += [
                run.lr * bc * stable_sum(t.masked_fill_(g == 0, 0.0)) for t, g in zip(distances, samples, strict=True)
            ]
            del distances, samples
        without_nonfinite(gs)  # the sum above still carries the NaN; the state must stay finite

        if not run.frozen:
            ss = run.states("s")
            weight = d / options.d0 * (d if h.safeguard_warmup else d * run.lr * bc)
            torch._foreach_mul_(ss, options.beta3)
            torch._foreach_add_(ss, torch._foreach_mul(run.sampled(gs), weight))
            run.store("s", ss, old["k"])
            norms += [stable_sum(t) for t in torch._foreach_abs(ss)]

        torch._foreach_mul_(gs, d)
        if h.beta1 > 0:
            ms = run.states("exp_avg")
            torch._foreach_mul_(ms, h.beta1)
            torch._foreach_add_(ms, gs, alpha=1 - h.beta1)
            run.store("exp_avg", ms, old["k"])
        torch._foreach_mul_(vs, h.beta2)
        torch._foreach_addcmul_(vs, gs, gs, value=1 - h.beta2)
        run.store("exp_avg_sq", vs, old["k"])

    @staticmethod
    def step_run(run: Run, step: Step, new_rows: Tensor) -> None:
        """Updates x of a run; ``new_rows`` are the estimates after the step."""
        h = run.h
        old, new = (dict(zip(FIELDS, rows[run.estimate], strict=True)) for rows in (step.rows, new_rows))
        is_step = new["k"] - old["k"]  # 0 while every gradient has been zero: x stays
        dlr = is_step * old["d"] * run.lr * bias_correction(h, old["k"])

        if h.beta1 > 0:
            ms = run.states("exp_avg")
        else:
            ms = without_nonfinite(run.gradients(float(step.grad_scale)))
            torch._foreach_mul_(ms, new["d"])
        denominators = torch._foreach_sqrt(run.states("exp_avg_sq"))
        _add_number(denominators, new["d"] * h.eps)
        steps = torch._foreach_div(ms, denominators)
        del denominators
        torch._foreach_mul_(steps, dlr)
        if h.weight_decay and h.decouple:
            xs = [finite_or_zero(current_x(slot)) for slot in run.slots]
            torch._foreach_add_(steps, torch._foreach_mul(xs, h.weight_decay * dlr))
        if run.slots[0].low_precision is None:
            torch._foreach_sub_([slot.param for slot in run.slots], steps)
            return
        for slot, step_of_x in zip(run.slots, steps, strict=True):
            apply_step(slot, step_of_x, old["k"])


def _add_number(tensors: tuple[Tensor, ...], number: Tensor) -> None:
    if is_fake(number):  # torch._foreach_add_ would read it
        for t in tensors:
            t.add_(number)
    else:
        torch._foreach_add_(tensors, number)


def _total(terms: list[Tensor], zero: Tensor) -> Tensor:
    return torch.stack(terms).sort().values.sum() if terms else zero


make_plan = ForeachPlan
