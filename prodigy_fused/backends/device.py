"""What plans of kernels on a device have in common: tables that are uploaded when they change, and no waiting.

The host passes on addresses. What it cannot know without waiting (``lr``, ``grad_scale`` and ``found_inf`` where they
are tensors on the device, and the estimate) is read by the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..step import Slot, Step
from .compiled import CompiledPlan


class DevicePlan(CompiledPlan):
    """The part of :class:`prodigy_fused.step.Plan` that does not depend on who compiled the kernels.

    Args:
        native: makes what reads the tensors' addresses of ``slots``: ``unchanged``, ``read_grads``.
    """

    reads_device = True

    def __init__(self, slots: Sequence[Slot], native: Any) -> None:
        super().__init__(slots, native)
        self.device = self.sums.device
        self._uploads: list[Tensor] = []  # what a captured graph copies anew at every replay
        self._captured = False
        self._outdated = True  # until an upload has succeeded
        self._spare: Tensor | None = None  # pinned memory for the next capture, which should not allocate it
        self._step_table = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._pointed_at: list[Tensor | None] = []

    def _upload_table(self, size: int, write: Callable[[int], None]) -> Tensor:
        """The table of the tensors, constant as long as the plan is; ``write`` puts it at an address of the host."""
        table = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._upload(table, write)
        return table

    def _upload_step(self, size: int, write: Callable[[int], None], changed: bool) -> None:
        """The table of the groups and gradients, in ``_step_table``."""
        self._outdated |= changed
        # A graph must bring its own gradients' addresses; and once there is one, replays may have done so.
        self._captured |= self._capturing()
        if self._outdated or self._captured:
            if self._step_table.numel() != size:
                self._step_table = self.sums.new_empty(size, dtype=torch.uint8)
            self._upload(self._step_table, write)
            self._outdated = False
        if self._spare is None and not self._capturing():
            self._spare = self._host_memory(size)

    def _lrs(self, step: Step) -> list[Tensor | None]:
        """One for each group; none is on the device where plans of other kinds take part in the step."""
        lrs = list(step.lrs) or [None] * len(step.hypers)
        self._pointed_at = [*lrs, step.device_scale]  # by a table; they may be copies for this step
        return lrs

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
        if self.device.type == "cpu":
            return nullcontext()
        guard: AbstractContextManager[None] = torch.get_device_module(self.device).device(self.device)
        return guard
