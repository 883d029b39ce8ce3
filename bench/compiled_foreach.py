"""torch.compile of our foreach backend: the two functions that do its arithmetic, compiled over all tensors at once."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch

from prodigy_fused import Prodigy, backends
from prodigy_fused.backends import foreach
from prodigy_fused.estimate import advance

NAME = "compiled_foreach"


@cache
def compiled() -> tuple[Any, Any]:
    """What makes m, v, s and the sums, and what makes x. The step around them is never compiled (prodigy.py)."""
    return torch.compile(foreach._update_run), torch.compile(foreach._step_run)


class CompiledForeachPlan(foreach.ForeachPlan):
    """The contract of :class:`prodigy_fused.step.Plan`; fused loops need no temporaries, hence one run for all."""

    def _run(self, grads: list[Any], step: Any) -> foreach.Run:
        return foreach.Run(list(self.slots), grads, step.hypers[0])

    def update(self, grads: list[Any], step: Any) -> None:
        dots: list[Any] = []
        norms: list[Any] = []
        compiled()[0](self._run(grads, step), step, dots, norms)
        self.sums.copy_(torch.stack([foreach._total(dots, self.sums), foreach._total(norms, self.sums)]))

    def finish(self, grads: list[Any], step: Any, last: bool) -> None:
        row = advance(step.row, step.sums, step.shared)
        compiled()[1](self._run(grads, step), step, row)
        step.row.copy_(row)


def make(params: Any) -> Prodigy:
    """Our optimizer on the compiled backend, which is known to it by name from now on."""
    if NAME not in backends.NAMES:
        module = ModuleType(f"prodigy_fused.backends.{NAME}")
        module.__dict__.update(unsupported=foreach.unsupported, make_plan=CompiledForeachPlan)
        sys.modules[module.__name__] = module
        backends.NAMES = (*backends.NAMES, NAME)
    return Prodigy(params, backend=NAME)
