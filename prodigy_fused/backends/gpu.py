"""The common part of the GPU plans: pinned staging buffers, table uploads on change, CUDA-graph capture.

The host passes addresses. What it cannot know without waiting (``lr``, ``grad_scale`` and ``found_inf`` if they are
tensors on the device, and the estimate) is read by the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import memmove
from typing import Any

import torch
from torch import Tensor

from ..step import BucketKey, Slot, Step
from .native import NativePlan

GRADIENT_BYTES = 16  # of one in gradient_words()
SPARES = 8  # captures without a step between them that need not allocate pinned memory


def capturing(device: torch.device) -> bool:
    """Returns whether a CUDA graph is being captured on the current stream; always False for other devices."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class GpuPlan(NativePlan):
    """The part of :class:`prodigy_fused.step.Plan` that does not depend on who compiled the kernels."""

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int, native: Any) -> None:
        super().__init__(key, slots, estimates, native)
        self.device = self.sums.device
        # All that captured graphs read and write, and copy anew at every replay. It outlives the plan (runtime.py).
        self.captured: list[Any] = []
        self._spares: list[Tensor] = []  # pinned memory for captures, which should not allocate it
        self._step_table = torch.empty(0, dtype=torch.uint8, device=self.device)
        # Of the last upload that has succeeded, the words of the record and those of the gradients.
        self._step_words = b"", b""
        self._last_stream: Any = None  # on which something was done last
        self._keep_alive: Step | None = None  # its tensors are read by the kernels

    def mend(self) -> bool:
        if not super().mend():
            return False
        self.upload_tables()
        return True

    def extend(self, slots: Sequence[Slot]) -> None:
        super().extend(slots)
        self.upload_tables()

    def upload_tables(self) -> None:
        """Uploads what is constant until the plan is mended or extended, to new memory: a graph may read the old."""
        raise NotImplementedError

    def _upload_table(self, size: int, write: Callable[[int], Any]) -> Tensor:
        """Returns a table that ``write`` fills at a host address."""
        table = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._upload(table, write)
        return table

    def _upload_step(self, step: Step, record: bytes, gradients: bytes) -> None:
        """Uploads the words that change between steps to ``_step_table``, if they did change."""
        self._keep_alive = step
        size = len(record) + len(gradients)
        # A graph must bring its own gradients' addresses; and once there is one, replays may have done so.
        if (record, gradients) != self._step_words or self.captured or capturing(self.device):
            if self._step_table.numel() != size:
                self._step_table = self.sums.new_empty(size, dtype=torch.uint8)
            self._step_words = b"", b""
            self._upload(self._step_table, lambda to: memmove(to, record + gradients, size))
            self._step_words = record, gradients
        if capturing(self.device):
            tables = (value for value in vars(self).values() if isinstance(value, (Tensor, dict)))
            self.captured += [step, *tables]
        else:
            self._prepare_captures(size)

    def _prepare_captures(self, size: int) -> None:
        """Allocates pinned memory for uploads of a step in captures, which should not."""
        if len(self._spares) < SPARES or self._spares[0].numel() != size:
            self._spares = list(self._pinned(SPARES * size).view(SPARES, -1))

    def _gradient_words(self) -> bytes:
        """Returns the words of the gradients: as long as they do not change the same object, so that a step asks for no
        memory of that size (Note [No new lists] in csrc/python/objects.h)."""
        words: bytes = self._native.gradient_words(self._step_words[1])
        return words

    def _words_without_gradients(self) -> bytes:
        """Returns the words of gradients that are not there yet: those of the last step, because one whose gradients
        come one by one ends with stand-ins for them, which are the same every time, and so nothing is uploaded."""
        former, size = self._step_words[1], GRADIENT_BYTES * len(self.slots)
        return former if len(former) == size else bytes(size)

    def _upload(self, to: Tensor, write: Callable[[int], Any]) -> None:
        host = self._host_memory(to.numel())
        write(host.data_ptr())
        to.copy_(host, non_blocking=True)
        if capturing(self.device):
            self.captured.append(host)

    def _host_memory(self, size: int) -> Tensor:
        if capturing(self.device) and self._spares and self._spares[0].numel() == size:
            return self._spares.pop()
        return self._pinned(size)

    def _pinned(self, size: int) -> Tensor:
        # torch's pinned-memory allocator does not reuse a block before the copy from it has completed.
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.device.type == "cuda")

    def _in_order(self) -> None:
        """Has the current stream wait for what was done on another: hooks of one backward pass may run on several."""
        if self.device.type == "cpu":
            return
        stream = torch.get_device_module(self.device).current_stream(self.device)
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def _guard(self) -> AbstractContextManager[None]:
        if self.device.type == "cpu":
            return nullcontext()
        guard: AbstractContextManager[None] = torch.get_device_module(self.device).device(self.device)
        return guard
