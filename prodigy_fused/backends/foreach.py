"""Prodigy in ``torch._foreach_*`` operations: any device PyTorch has, and no value read back from a GPU.

The order is Algorithm 4's own: ``update`` computes m, v, s and the sums, ``finish`` computes x with d_new. That is more
passes over memory than a compiled backend needs, but every launch covers a whole run of tensors: what is computed for
one step only is one flat tensor, in which each parameter begins a new row (see :class:`.flat.Grid`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..estimate import FIELDS
from ..options import SIXTEEN_BIT, Group
from ..state import KEYS
from ..step import BucketKey, Slot, Step
from ..sums import sums_of_any_order
from ..tensors import are_apart, check_gradient, is_fake
from .elementwise import TensorPlan
from .flat import Values
from .numbers import Numbers, numbers_of, with_new_estimate
from .pieces import Piece, RowTable, pieces_of
from .runs import MOST, Run

COMPILED = ONE_PASS = READS_DEVICE = False
# A run has at most this many elements, so that its temporaries do not grow with the model; on a CPU they fit a cache.
RUN_ELEMENTS, RUN_ELEMENTS_PER_THREAD = 1 << 23, 1 << 18
# On a CPU torch takes the tensors of a list one by one; smaller ones are copied to a flat one and back.
SMALL = 1 << 13
# Where nothing is copied, a run may have so many times as many, so that what Python does takes less of the time.
LISTED = 2
# With 16 or 8 bits those from this size on are runs of their own: what is flat need not be put together from many then.
LARGE = 1 << 16


def missing(device: torch.device) -> str | None:
    """Returns None: nothing has to be installed."""
    return None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns None: takes every tensor the optimizer takes."""
    return None


def product(values: Values, factor: Any, most: float = math.inf) -> tuple[Values, float]:
    """Returns values and a number, at most ``most``, whose product is that of ``values`` and ``factor``."""
    if isinstance(factor, Tensor) or not factor <= most:
        return Values(values.grid, values.joined() * factor), 1.0
    return values, factor


def average(old: Values, new: Values, beta: float, factor: float) -> None:
    """Sets ``old`` to ``beta * old + (1 - beta) * factor * new``."""
    if factor == 1:
        old.apply("lerp_", new, 1 - beta)
        return
    new, share = product(new, (1 - beta) * factor, MOST)
    old.apply("mul_", beta).apply("add_", new, alpha=share)


def _order(t: Tensor | None) -> Any:
    return t if t is None else (t.shape, t.stride(), t.dtype)


class ForeachPlan(TensorPlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int) -> None:
        super().__init__(key, slots, estimates)
        names = [str(dtype).removeprefix("torch.") for dtype in SIXTEEN_BIT]
        self._rounds = key.dtype in names or key.state_format in (*names, "8bit")
        self._tables: dict[Any, RowTable] = {}
        self._runs: list[Run] | None = None  # of this step, from update to finish
        self._apart = True  # else each tensor is a run of its own, or one's new values would be another's old ones

    def _state_tensors(self) -> list[Any]:
        return [slot.state.get(key) for slot in self.slots for key in KEYS]

    def _look_at_state(self) -> None:
        tensors = self._state_tensors()
        # Not the tensors: it may be to free their memory that others are put in their place.
        self._objects = [t if t is None else ref(t) for t in tensors]
        self._orders = list(map(_order, tensors))

    def unchanged(self) -> bool:
        # Pieces take state in the order of memory, and a tensor that was put in its place may have another one.
        if not super().unchanged():
            return False
        tensors = self._state_tensors()
        pairs = zip(tensors, self._objects, strict=True)
        if all([t is (known and known()) for t, known in pairs]) and not self._has_orders:
            return True
        former = self._orders
        self._look_at_state()
        return former == self._orders

    def extend(self, slots: Sequence[Slot]) -> None:
        super().extend(slots)
        self._has_orders = not all(slot.param.is_contiguous() for slot in slots)
        self._look_at_state()

    def load_gradients(self, grads: Sequence[Tensor | None]) -> None:
        super().load_gradients(grads)
        self._apart = are_apart([slot.param for slot in self.slots])

    def release_gradients(self) -> None:
        super().release_gradients()
        self._runs = None

    def on_host(self, step: Step) -> bool:
        """Returns whether the estimates are numbers that can be read without waiting."""
        return step.rows.is_cpu and not is_fake(step.rows)

    def most(self) -> int:
        """Returns how many elements a run may have."""
        return RUN_ELEMENTS_PER_THREAD * torch.get_num_threads() if self.sums.is_cpu else RUN_ELEMENTS

    def runs(self, step: Step, slots: Sequence[Slot], grads: Sequence[Tensor | None]) -> Iterator[Run]:
        """Yields the tensors that have a gradient and a learning rate, in runs."""
        most, on_host = self.most(), self.on_host(step)
        listed = LISTED * most if on_host and not self._rounds else most
        small = SMALL if on_host else 0
        kinds: dict[Any, int] = {}
        kind_of: dict[tuple[int, torch.dtype, int], int] = {}  # by group, the gradient's dtype and `lead`
        waiting: dict[tuple[int, bool], tuple[int, list[Piece]]] = {}
        for slot, grad in zip(slots, grads, strict=True):
            h = step.hypers[slot.group]
            if grad is None or h.lr == 0 or grad.numel() == 0:
                continue
            if not self._apart or (on_host and self._rounds and grad.numel() >= LARGE):
                for piece in pieces_of(slot, grad, most):
                    yield Run([piece], h, on_host, False, self._tables)
                continue
            lead = slot.random_base % 8 if self._rounds else 0  # see row_bits; not 0 in some shards
            own = slot.group, grad.dtype, lead
            if own not in kind_of:
                kind = h, slot.estimate, slot.slice_p, slot.low_precision, grad.dtype, lead
                kind_of[own] = kinds.setdefault(kind, len(kinds))
            for piece in pieces_of(slot, grad, most):
                size = piece.x.numel()
                key = kind_of[own], size < small
                elements, pieces = waiting.get(key, (0, []))
                if pieces and elements + size > (most if key[1] else listed):
                    yield Run(pieces, step.hypers[pieces[0].slot.group], on_host, key[1], self._tables)
                    elements, pieces = 0, []
                pieces.append(piece)
                waiting[key] = elements + size, pieces
        for (_, copies), (_, pieces) in waiting.items():
            yield Run(pieces, step.hypers[pieces[0].slot.group], on_host, copies, self._tables)

    def begin(self, step: Step) -> None:
        zero = self.sums.new_zeros(1)
        self._terms: list[tuple[list[Tensor], list[Tensor]]] = [([zero], [zero]) for _ in step.rows]

    def update(self, step: Step) -> None:
        self.begin(step)
        self._update(step, self._kept_runs(step))
        self.add_up(step)

    def update_one(self, step: Step, at: int, grad: Tensor) -> None:
        slot = self.slots[at]
        check_gradient(slot.index, slot.param, grad)
        self._update(step, self.runs(step, [slot], [grad]))

    def _kept_runs(self, step: Step) -> Iterator[Run]:
        """Yields the runs, and keeps them for ``finish``, unless that would keep copies of gradients alive."""
        kept: list[Run] | None = []
        for run in self.runs(step, self.slots, self._grads):
            yield run
            if kept is not None and not run.has_copies:
                kept.append(run)
            else:
                kept = None
        self._runs = kept

    def _update(self, step: Step, runs: Iterable[Run]) -> None:
        numbers = self._numbers(step)
        for run in runs:
            self.update_run(run, numbers(run.slot.group), *self._terms[run.slot.estimate])
            run.forget()

    def add_up(self, step: Step) -> None:
        both = (torch.stack([torch.cat(dots), torch.cat(norms)]) for dots, norms in self._terms)
        self.sums.copy_(torch.stack([*map(sums_of_any_order, both)]))

    def finish(self, step: Step, last: bool) -> None:
        new_rows = step.advanced()
        news = self._rows(step, new_rows)
        numbers = self._numbers(step, news)
        for run in self._runs if self._runs is not None else self.runs(step, self.slots, self._grads):
            own = numbers(run.slot.group)
            if not self.on_host(step) or news[run.slot.estimate]["k"] != own.k:
                self.step_run(run, own)
                run.forget()
        if last:
            step.new_rows.copy_(new_rows)

    def _numbers(self, step: Step, news: list[dict[str, Any]] | None = None) -> Callable[[int], Numbers]:
        """Returns what gives the numbers of a group, for the second phase if there are new estimates."""
        olds, owners = self._rows(step, step.rows), step.owners

        @cache
        def numbers(group: int) -> Numbers:
            h, estimate = step.hypers[group], owners[group]
            found = numbers_of(h, step.options[group], olds[estimate], float(step.grad_scale))
            return with_new_estimate(found, h, news[estimate]) if news is not None else found

        return numbers

    def _rows(self, step: Step, rows: Tensor) -> list[dict[str, Any]]:
        return [dict(zip(FIELDS, row, strict=True)) for row in (rows.tolist() if self.on_host(step) else rows)]

    @staticmethod
    def update_run(run: Run, numbers: Numbers, dots: list[Tensor], norms: list[Tensor]) -> None:
        """Updates m, v and s of a run, and appends the parts of its estimate's two sums."""
        h, k = run.h, numbers.k
        if run.displaced:
            run.mend_displacement()
        g = run.gradients(numbers.grad_scale)
        if run.slot.frozen:
            g = run.finite(g)
        else:
            samples = run.sampled(g)
            all_of_them = samples is g
            sums, clean = _products(run, samples)
            dots.append(sums * numbers.lr)
            if not clean:
                samples = run.finite(samples)  # the sum above still carries the NaN; the state must stay finite
            g = samples if all_of_them else run.finite(g)
            s = run.values("s")
            terms, factor = product(samples, numbers.weight)
            del samples
            average(s, terms, numbers.beta3, factor)
            del terms
            run.store("s", s, k)
            norms.append(s.grid.row_sums(run.sizes(s)))
            del s

        g, factor = product(g, numbers.d, MOST)
        if h.beta1 > 0:
            m = run.values("exp_avg")
            average(m, g, h.beta1, factor)
            run.store("exp_avg", m, k)
            del m
        v = run.values("exp_avg_sq")
        v.apply("mul_", h.beta2).apply("addcmul_", g, g, value=(1 - h.beta2) * factor * factor)
        run.store("exp_avg_sq", v, k)

    @staticmethod
    def step_run(run: Run, numbers: Numbers) -> None:
        """Updates x of a run."""
        if run.h.beta1 > 0:
            m, factor = run.values("exp_avg"), 1.0
        else:
            m, factor = product(run.finite(run.gradients(numbers.grad_scale)), numbers.d_new, MOST)
        root = run.root()
        if numbers.shrink is None:
            root.apply("add_", numbers.shift)
        else:
            root = Values(run.grid, torch.addcmul(numbers.shift, root.joined(), numbers.shrink))
        run.subtract(m, root, factor * numbers.dlr, numbers.decay, numbers.k)


def _products(run: Run, samples: Values) -> tuple[Tensor, bool]:
    """Returns the sums of rows of ``g * (x0 - x)``, and whether they are known to be finite, as g then is, too."""
    grid, products = samples.grid, run.distances().apply("mul_", samples).joined()
    sums = grid.row_sums(products)
    if run.on_host and math.isfinite(sums.sum().item()):
        return sums, True
    # Where g is 0, x or x0 need not be finite. On a CPU this takes longer than all of the above.
    return grid.row_sums(products.masked_fill_(samples.joined() == 0, 0.0)), False


make_plan = ForeachPlan
