"""The backend ``emulated``: the CUDA backend, its kernels run by the CPU on CPU tensors. For the tests alone.

What a GPU publishes in ``param_groups`` are views of its memory, not numbers; so it is here.
"""

import importlib
import itertools
import os
import sys
from pathlib import Path

import torch

from prodigy_fused import backends
from prodigy_fused.backends import cuda
from prodigy_fused.backends.native import LAYOUT, check_layout, unfit
from prodigy_fused.runtime import Runtime

BUILD = Path(os.environ.get("PRODIGY_FUSED_EMULATION", Path(__file__).parents[2] / "build" / "emulation")).resolve()
sys.path.append(str(BUILD))
try:
    native = importlib.import_module("_emulated")
    check_layout(native, LAYOUT)
    MISSING = None
except ImportError as error:
    native, MISSING = None, f"the emulation of CUDA is not built ({error}): make emulation"

COMPILED = False  # so that it is never chosen unasked
ONE_PASS = READS_DEVICE = True


def missing(device):
    return None


def unsupported(p, group):
    if MISSING:
        return MISSING
    return unfit(p, group) if p.device.type == "cpu" else f"the parameter is on {p.device}: the emulation is on the CPU"


class EmulatedPlan(cuda.CudaPlan):
    def __init__(self, key, slots, estimates):
        super().__init__(key, slots, estimates, native.CudaPlan)

    def update(self, step):
        if grid is None:  # another one in every step: the results must not care
            seed = next(_seeds)
            native.configure(resident=1 + seed % 5, seed=seed)
        else:
            native.configure(*grid)
        super().update(step)


_seeds = itertools.count()
grid = None  # the most blocks of a launch, and a seed for the order in which blocks and threads run


make_plan = EmulatedPlan


class DeviceRows(torch.Tensor):
    """Rows of the estimate that a step takes for a GPU's. What it publishes of them are plain 0-dim tensors."""

    is_cpu = False

    def unbind(self, dim=0):
        parts = super().unbind(dim)
        return parts if self.dim() > 1 else tuple(part.as_subclass(torch.Tensor) for part in parts)


def publish_views():
    """Has the steps of ``emulated`` publish views of their new rows, as those on a GPU do."""
    current = Runtime._current_estimates

    def current_estimates(self, groups, *more):
        estimates = current(self, groups, *more)
        asked = all(group["backend"] == "emulated" for group in groups)
        if asked and not isinstance(estimates.rows, DeviceRows):
            estimates.rows = estimates.rows.as_subclass(DeviceRows)
        return estimates

    Runtime._current_estimates = current_estimates


def register():
    """Makes ``backend="emulated"`` a choice."""
    if "emulated" not in backends.names():
        backends.register("emulated", sys.modules[__name__])
        for readers in (backends.READ_SHIFTS, backends.READ_ROWS):
            readers.add("emulated")
        publish_views()
