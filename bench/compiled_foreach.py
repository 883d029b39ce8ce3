"""torch.compile of the foreach backend: its two functions that do arithmetic, compiled over all tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain, groupby
from typing import Any

import torch

from prodigy_fused import Prodigy, backends
from prodigy_fused.backends import foreach

NAME = "compiled_foreach"


@cache
def compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """Returns the functions for the state and the sums, and for x; the code around them is never compiled."""
    return torch.compile(foreach.ForeachPlan.update_run), torch.compile(foreach.ForeachPlan.step_run)


class CompiledForeachPlan(foreach.ForeachPlan):
    """A foreach plan with compiled functions, called once per group: fused loops have no temporaries to keep small."""

    def runs(self, step: Any) -> Iterator[foreach.Run]:
        """Yields the tensors that have a gradient and a learning rate, one run per group."""
        for _, runs in groupby(super().runs(step), lambda run: run.slots[0].group):
            yield _joined(list(runs))

    @staticmethod
    def update_run(*arguments: Any) -> None:
        """Updates m, v and s of a run, and appends each tensor's part of the two sums."""
        compiled()[0](*arguments)

    @staticmethod
    def step_run(*arguments: Any) -> None:
        """Updates x of a run."""
        compiled()[1](*arguments)


def _joined(runs: list[foreach.Run]) -> foreach.Run:
    def all_of(lists: Iterable[list[Any]]) -> list[Any]:
        return list(chain.from_iterable(lists))

    return foreach.Run(all_of(run.slots for run in runs), all_of(run.grads for run in runs), runs[0].h)


class CompiledForeach:
    """The backend, as :class:`prodigy_fused.step.Backend` describes one."""

    COMPILED = ONE_PASS = READS_DEVICE = False  # not compiled as fused=True means it
    missing = staticmethod(foreach.missing)
    unsupported = staticmethod(foreach.unsupported)
    make_plan = CompiledForeachPlan


def make(params: Any) -> Prodigy:
    """Returns our optimizer on the compiled foreach backend, and registers that backend."""
    backends.register(NAME, CompiledForeach())
    return Prodigy(params, backend=NAME)
