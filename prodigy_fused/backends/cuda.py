"""The CUDA backend: one launch moves m, v, s and x of all parameters, a second one finishes (csrc/cuda)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..step import Slot, Step
from .compiled import MISSING, unfit
from .device import DevicePlan

if not MISSING:
    from .. import _C


def unsupported(p: Tensor, group: dict[str, Any]) -> str | None:
    """Why this backend cannot take the parameter, and the remedy; None if it can."""
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


class CudaPlan(DevicePlan):
    """The contract of :class:`prodigy_fused.step.Plan`."""

    def __init__(self, slots: Sequence[Slot], native: Any = None) -> None:
        super().__init__(slots, native or _C.CudaPlan)
        self._buffers = {
            "table": self._upload_table(self._plan.table_bytes, self._plan.write_table),
            "partials": torch.empty(2 * self._plan.chunk_count, dtype=torch.float64, device=self.device),
            "arrived": torch.zeros(1, dtype=torch.int32, device=self.device),
            "sums": self.sums,
        }

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        with self._guard():
            changed = self._plan.pack_step(step, self._lrs(step))
            self._upload_step(self._plan.step_bytes, self._plan.write_step, changed)
            self._plan.update(self._addresses(row=step.row), *self._amp(step), self._stream())

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        with self._guard():
            addresses = self._addresses(row=step.row, sums=step.sums)
            self._plan.finish(addresses, *self._amp(step), self._stream(), last)

    def _amp(self, step: Step) -> tuple[Any, Any]:
        return step.grad_scale if step.device_scale is None else step.device_scale, step.found_inf

    def _addresses(self, **more: Tensor) -> dict[str, int]:
        buffers = {**self._buffers, "step": self._step_table, **more}
        return {name: t.data_ptr() for name, t in buffers.items()}

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


make_plan = CudaPlan
