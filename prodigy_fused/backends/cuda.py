"""The CUDA backend: one launch updates m, v, s and x of all parameters, a second one finishes (csrc/cuda)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..options import Group
from ..record import STEP
from ..step import BucketKey, Slot, Step
from .gpu import GpuPlan
from .native import MISSING, unfit

if not MISSING:
    from .. import _C

COMPILED = ONE_PASS = READS_DEVICE = True


def missing(device: torch.device) -> str | None:
    """Returns None: where these kernels are missing, Triton's are easier to have."""
    return None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns why this backend cannot take the parameter, and the remedy; None if it can."""
    if MISSING:
        return MISSING
    if p.device.type != "cuda":
        return f"the parameter is on {p.device}, not on a GPU"
    if torch.version.hip:
        return "this PyTorch is built for ROCm, not for CUDA: use backend='triton'"
    if _C.CUDA is None:
        return "prodigy_fused was built without CUDA: reinstall it with PRODIGY_FUSED_CUDA=1 in the environment"
    if problem := _problem(p.device):
        return (
            f"the kernels of this build ({_C.CUDA}) cannot run on {p.device} ({problem}): update its driver, or "
            "reinstall prodigy_fused from source with CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=native, or use fused=False"
        )
    return unfit(p, group)


@cache
def _problem(device: torch.device) -> str:
    with torch.cuda.device(device):
        return str(_C.cuda_problem())


class CudaPlan(GpuPlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int, native: Any = None) -> None:
        super().__init__(key, slots, estimates, native or _C.CudaPlan)
        self.upload_tables()

    def upload_tables(self) -> None:
        self._partials = torch.empty(self._native.chunk_count, 2, dtype=torch.float64, device=self.device)
        self._buffers = {
            "table": self._upload_table(self._native.table_bytes, self._native.write_table),
            "partials": self._partials,
            "arrived": torch.zeros(1, dtype=torch.int32, device=self.device),
        }

    def update(self, step: Step) -> None:
        with self._guard():
            self._upload_step(step, step.record[STEP.size :], self._gradient_words())
            self._native.update(step.record, **self._addresses(step, self.sums), stream=self._stream())

    def begin(self, step: Step) -> None:
        with self._guard():
            self._in_order()
            self._upload_step(step, step.record[STEP.size :], self._words_without_gradients())
            super().begin(step)

    def update_one(self, step: Step, at: int, grad: Tensor) -> None:
        with self._guard():
            self._in_order()
            addresses = {**self._addresses(step, self.sums), "stream": self._stream()}
            self._update_laid_out(at, grad, lambda t: self._native.update_one(at, t, step.record, **addresses))

    def add_up(self, step: Step) -> None:
        with self._guard():
            self._in_order()
            self._upload_step(step, step.record[STEP.size :], self._gradient_words())
            self._native.add_up(step.record, **self._addresses(step, self.sums), stream=self._stream())

    def finish(self, step: Step, last: bool) -> None:
        with self._guard():
            addresses = {**self._addresses(step, step.sums), "new_row": step.new_rows.data_ptr()}
            self._native.finish(step.record, **addresses, stream=self._stream(), last=last)

    def _addresses(self, step: Step, sums: Tensor) -> dict[str, int]:
        buffers = {**self._buffers, "step": self._step_table, "row": step.rows, "sums": sums}
        return {name: t.data_ptr() for name, t in buffers.items()}

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


make_plan = CudaPlan
