"""The CUDA backend: one launch moves m, v, s and x of all parameters, a second one finishes (csrc/cuda).

The host never waits: it passes on addresses. What it cannot know without waiting (``lr``, ``grad_scale`` and
``found_inf`` where they are tensors on the device, and the estimate) is read by the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..step import Slot, Step
from .compiled import MISSING, CompiledPlan, unfit

if not MISSING:
    from .. import _C


def unsupported(p: Tensor, group: dict[str, Any]) -> str | None:
    """Why this backend cannot take the parameter, and the remedy; None if it can."""
    if MISSING:
        return MISSING
    if p.device.type != "cuda":
        return f"the parameter is on {p.device}, not on a GPU"
    if torch.version.hip:
        return "this PyTorch is built for ROCm, not for CUDA: use fused=False"
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


class CudaPlan(CompiledPlan):
    """The contract of :class:`prodigy_fused.step.Plan`."""

    reads_device = True

    def __init__(self, slots: Sequence[Slot], native: Any = None) -> None:
        super().__init__(slots, native or _C.CudaPlan)
        self.device = self.sums.device
        self._uploads: list[Tensor] = []  # what a captured graph copies anew at every replay
        self._captured = False
        self._outdated = True  # until an upload has succeeded
        self._spare: Tensor | None = None  # pinned memory for the next capture, which should not allocate it
        table = torch.empty(self._plan.table_bytes, dtype=torch.uint8, device=self.device)
        self._upload(table, self._plan.write_table)
        self._step_table = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._buffers = {
            "table": table,
            "partials": torch.empty(2 * self._plan.chunk_count, dtype=torch.float64, device=self.device),
            "arrived": torch.zeros(1, dtype=torch.int32, device=self.device),
            "sums": self.sums,
        }

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        with self._guard():
            self._outdated |= self._plan.pack_step(step, list(step.lrs))
            # A graph must bring its own gradients' addresses; and once there is one, replays may have done so.
            self._captured |= self._capturing()
            if self._outdated or self._captured:
                if self._step_table.numel() != self._plan.step_bytes:
                    self._step_table = self.sums.new_empty(self._plan.step_bytes, dtype=torch.uint8)
                self._upload(self._step_table, self._plan.write_step)
                self._outdated = False
            if self._spare is None and not self._capturing():
                self._spare = self._host_memory(self._plan.step_bytes)
            self._plan.update(self._addresses(row=step.row), *self._amp(step), self._stream())

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        with self._guard():
            addresses = self._addresses(row=step.row, sums=step.sums)
            self._plan.finish(addresses, *self._amp(step), self._stream(), last)

    def _addresses(self, **more: Tensor) -> dict[str, int]:
        buffers = {**self._buffers, "step": self._step_table, **more}
        return {name: t.data_ptr() for name, t in buffers.items()}

    def _amp(self, step: Step) -> tuple[Any, Any]:
        return step.grad_scale if step.device_scale is None else step.device_scale, step.found_inf

    def _upload(self, to: Tensor, write: Callable[[int], None]) -> None:
        host = self._host_memory(to.numel())
        write(host.data_ptr())
        to.copy_(host, non_blocking=True)
        if self._capturing():
            self._uploads.append(host)

    def _host_memory(self, size: int) -> Tensor:
        if self._capturing() and self._spare is not None and self._spare.numel() == size:
            spare, self._spare = self._spare, None
            return spare
        # torch's allocator gives pinned memory out again only after the copy from it is done.
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.device.type == "cuda")

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _guard(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


make_plan = CudaPlan
