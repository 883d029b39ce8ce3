"""torch.compile of the foreach backend: its two functions that do arithmetic, compiled over all tensors at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
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
    """A foreach plan with compiled functions, called once for all tensors: fused loops have no temporaries."""

    def on_host(self, step: Any) -> bool:
        """Returns False: numbers would be compiled in."""
        return False

    def most(self) -> int:
        """Returns that a run has no end."""
        return sys.maxsize

    @staticmethod
    def update_run(*arguments: Any) -> None:
        """Updates m, v and s of a run, and appends each tensor's part of the two sums."""
        compiled()[0](*arguments)

    @staticmethod
    def step_run(*arguments: Any) -> None:
        """Updates x of a run."""
        compiled()[1](*arguments)


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
