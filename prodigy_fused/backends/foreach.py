"""Prodigy in ``torch._foreach_*`` operations: any device PyTorch has, and no value read back from a GPU.

The order is Algorithm 4's own: ``update`` computes m, v, s and the sums, ``finish`` computes x with d_new. That is more
passes over memory than a compiled backend needs, but every launch covers a whole run of tensors: what is computed for
one step only is one flat tensor, in which each parameter begins a new row (see :class:`.flat.Grid`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..hyper import EstimateOptions, Hyper
from ..options import Group
from ..step import BucketKey, Slot, Step
from ..sums import row_sums, sum_of_any_order
from ..tensors import is_fake
from .elementwise import TensorPlan, bias_correction
from .flat import Values, finite_or_zero_, lists
from .pieces import Piece, RowTable, Run, pieces_of

COMPILED = ONE_PASS = READS_DEVICE = False
# A run has at most this many elements, so that its temporaries do not grow with the model. On a CPU, where an operation
# costs no launch, they stay in the cache of each thread: torch gives a thread no less than these.
RUN_ELEMENTS, RUN_ELEMENTS_PER_THREAD = 1 << 23, 1 << 15


def missing(device: torch.device) -> str | None:
    """Returns None: nothing has to be installed."""
    return None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns None: takes every tensor the optimizer takes."""
    return None


LEAST_DLR = 1e-30  # whose reciprocal float32 can hold


class Numbers(NamedTuple):
    """The scalars of a run: numbers on a CPU, elsewhere 0-dim tensors, which nobody waits for."""

    k: Any
    d: Any
    lr: Any  # with the bias correction
    weight: Any  # of g in s
    beta3: float
    grad_scale: float
    d_new: Any = None
    decay: Any = None
    shrink: Any = None  # sqrt(v) * shrink + shift is what m is divided by
    shift: Any = None


def numbers_of(h: Hyper, options: EstimateOptions, old: Any, grad_scale: float) -> Numbers:
    """Returns the scalars of the first phase."""
    d, lr = old["d"], float(h.lr) * bias_correction(h, old["k"])
    weight = d / options.d0 * (d if h.safeguard_warmup else d * lr)
    return Numbers(old["k"], d, lr, weight, options.beta3, grad_scale)


def with_new_estimate(numbers: Numbers, h: Hyper, new: Any) -> Numbers:
    """Adds the scalars of the second phase."""
    dlr, d_new = numbers.d * numbers.lr, new["d"]
    decay = h.weight_decay * dlr if h.decouple else 0.0
    if not isinstance(dlr, Tensor):
        dlr = max(dlr, LEAST_DLR)
        return numbers._replace(d_new=d_new, decay=decay, shrink=1 / dlr, shift=d_new * h.eps / dlr)
    is_step = new["k"] != numbers.k  # else every gradient has been zero, and x stays
    dlr = dlr.clamp(min=LEAST_DLR)
    shrink, shift = torch.where(is_step, 1 / dlr, 0.0), torch.where(is_step, d_new * h.eps / dlr, math.inf)
    return numbers._replace(d_new=d_new, decay=decay * is_step, shrink=shrink, shift=shift)


class ForeachPlan(TensorPlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int) -> None:
        super().__init__(key, slots, estimates)
        self._tables: dict[Any, RowTable] = {}

    def on_host(self, step: Step) -> bool:
        """Returns whether the estimates are numbers that can be read without waiting."""
        return step.rows.is_cpu and not is_fake(step.rows)

    def most(self) -> int:
        """Returns how many elements a run may have."""
        return RUN_ELEMENTS_PER_THREAD * max(torch.get_num_threads(), 2) if self.sums.is_cpu else RUN_ELEMENTS

    def runs(self, step: Step) -> Iterator[Run]:
        """Yields the tensors that have a gradient and a learning rate, in runs."""
        most, gathers = self.most(), self.on_host(step)
        waiting: list[Piece] = []
        elements, key = 0, None
        for slot, grad in zip(self.slots, self._grads, strict=True):
            h = step.hypers[slot.group]
            if grad is None or h.lr == 0 or grad.numel() == 0:
                continue
            if key != (slot.estimate, slot.slice_p, slot.low_precision, h):
                if waiting:
                    yield Run(waiting, key[-1], gathers, self._tables)
                waiting, elements, key = [], 0, (slot.estimate, slot.slice_p, slot.low_precision, h)
            for piece in pieces_of(slot, grad, most):
                if waiting and elements + piece.size > most:
                    yield Run(waiting, h, gathers, self._tables)
                    waiting, elements = [], 0
                waiting.append(piece)
                elements += piece.size
        if waiting:
            yield Run(waiting, key[-1], gathers, self._tables)

    def update(self, step: Step) -> None:
        zero = self.sums.new_zeros(1)
        sums: list[tuple[list[Tensor], list[Tensor]]] = [([zero], [zero]) for _ in step.rows]
        olds = self._rows(step, step.rows)
        for run in self.runs(step):
            slot = run.slot
            numbers = numbers_of(run.h, step.options[slot.group], olds[slot.estimate], float(step.grad_scale))
            self.update_run(run, numbers, *sums[slot.estimate])
        self.sums.copy_(torch.stack([torch.stack([*map(sum_of_any_order, both)]) for both in sums]))

    def finish(self, step: Step, last: bool) -> None:
        new_rows = step.advanced()
        olds, news = self._rows(step, step.rows), self._rows(step, new_rows)
        for run in self.runs(step):
            slot = run.slot
            numbers = numbers_of(run.h, step.options[slot.group], olds[slot.estimate], float(step.grad_scale))
            if not self.on_host(step) or news[slot.estimate]["k"] != numbers.k:
                self.step_run(run, with_new_estimate(numbers, run.h, news[slot.estimate]))
        if last:
            step.new_rows.copy_(new_rows)

    def _rows(self, step: Step, rows: Tensor) -> list[dict[str, Any]]:
        return [dict(zip(FIELDS, row, strict=True)) for row in (rows.tolist() if self.on_host(step) else rows)]

    @staticmethod
    def update_run(run: Run, numbers: Numbers, dots: list[Tensor], norms: list[Tensor]) -> None:
        """Updates m, v and s of a run, and appends the parts of its estimate's two sums."""
        h, k = run.h, numbers.k
        if run.displaced:
            run.mend_displacement()
        g = run.gradients(numbers.grad_scale)
        if not run.slot.frozen:
            samples = run.sampled(g)
            products = run.distances().mul_(samples)
            # Where g is 0, x or x0 need not be finite. On a CPU this is so slow that a look comes before.
            if not isinstance(numbers.d, float) or not products.sum().isfinite():
                products.masked_fill_(samples == 0, 0.0)
            dots.append(row_sums(products) * numbers.lr)
            del products, samples
        finite_or_zero_(g)  # the sum above still carries the NaN; the state must stay finite
        if not run.slot.frozen:
            s = run.state("s")
            averages, scaled = lists(s, Values(s.grid, run.sampled(g) * (numbers.weight / (1 - numbers.beta3))))
            torch._foreach_lerp_(averages, scaled, 1 - numbers.beta3)
            del averages, scaled
            run.store("s", s, k)
            norms.append(row_sums(s.joined().abs_()))
            del s

        gs = Values(run.grid, g.mul_(numbers.d))
        if h.beta1 > 0:
            m = run.state("exp_avg")
            averages, terms = lists(m, gs)
            torch._foreach_lerp_(averages, terms, 1 - h.beta1)
            run.store("exp_avg", m, k)
            del m
        v = run.state("exp_avg_sq")
        averages, terms = lists(v, gs)
        torch._foreach_mul_(averages, h.beta2)
        torch._foreach_addcmul_(averages, terms, terms, value=1 - h.beta2)
        run.store("exp_avg_sq", v, k)

    @staticmethod
    def step_run(run: Run, numbers: Numbers) -> None:
        """Updates x of a run."""
        if run.h.beta1 > 0:
            m = run.values(run.grid, run.stored("exp_avg"))
        else:
            m = Values(run.grid, finite_or_zero_(run.gradients(numbers.grad_scale)).mul_(numbers.d_new))
        root = run.flat(run.stored("exp_avg_sq")).sqrt_()
        if isinstance(numbers.shrink, Tensor):
            root = torch.addcmul(numbers.shift, root, numbers.shrink)
        else:
            root.mul_(numbers.shrink).add_(numbers.shift)
        run.subtract(m, root, numbers.decay, numbers.k)


make_plan = ForeachPlan
