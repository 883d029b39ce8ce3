"""The Triton backend: the CUDA backend's step where there is no nvcc, and on AMD and Intel GPUs (triton_kernels/).

Triton is imported when a parameter on a GPU asks for it, not before. Its kernels are compiled once, and kept on disk
by Triton: nothing that changes between steps is a constant of theirs.
"""

from __future__ import annotations

import ctypes
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hyper import Hyper, Shared
from ..low_precision import arithmetic
from ..step import Slot, Step
from . import compiled
from .addresses import STATES, TensorList, memory_order
from .device import DevicePlan

if not compiled.MISSING:
    from .. import _C

OLDEST = (3, 6)  # that was tried
PROGRAMS_PER_UNIT = 8  # about what a multiprocessor has room for


class Sizes(NamedTuple):
    """Constants of the kernels. Chosen, not tuned: they were not measured on a GPU yet."""

    chunk: int = 1 << 13  # elements
    block: int = 1 << 9  # elements that a program takes at a time, 4 a thread; in float64 half as many
    lanes: int = 1 << 9  # of the last sum
    warps: int = 4


SIZES = Sizes()
# Words of 8 bytes, as triton_kernels.tables has them.
SHARED = struct.Struct("=5d2Q8x")
GROUP = struct.Struct("=9d2Q8x")


def missing(device: torch.device) -> str | None:
    """Why Triton cannot be used on this GPU, and the remedy; None if it can, or if this is no GPU."""
    return _broken(device) if device.type in ("cuda", "xpu") else None


def unsupported(p: Tensor, group: dict[str, Any]) -> str | None:
    """Why this backend cannot take the parameter, and the remedy; None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and group["backend"] == "triton"  # the tests do so
    if p.device.type not in ("cuda", "xpu") and not (interpreted and p.device.type == "cpu"):
        return f"the parameter is on {p.device}, not on a GPU"
    return compiled.unfit(p, group) or _broken(p.device)


@cache
def _broken(device: torch.device) -> str | None:
    try:
        from triton import __version__ as version
    except ImportError as error:
        return f"Triton is missing ({error}): pip install triton, or use fused=False"
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"Triton {version} is too old: install {'.'.join(map(str, OLDEST))} or newer, or use fused=False"
    if os.environ.get("TRITON_INTERPRET") == "1" and device.type != "cpu":
        # It would read and write this device's memory as if it were the host's.
        return "TRITON_INTERPRET=1 is set, and the interpreter follows no GPU addresses: unset it, or use fused=False"
    try:
        _try_out(device)
    except Exception as error:  # whatever a compiler, a linker or a driver may raise
        reason = next(iter(str(error).splitlines()), "")
        return (
            f"Triton {version} cannot compile its kernels here ({type(error).__name__}: {reason}): "
            "it needs a C compiler (gcc or clang, on the path or in CC); or use fused=False"
        )
    return None


def _try_out(device: torch.device) -> None:
    """A step over nothing. What it compiles is not compiled again."""
    p = torch.empty(0, dtype=torch.float32, device=device)
    plan = TritonPlan([Slot(0, p, dict.fromkeys(STATES, p), 0, 1)])
    row = torch.ones(8, dtype=torch.float64, device=device)
    step = Step([Hyper(1.0, 0.9, 0.999, 1e-8, 0.0, True, False, False, False)], Shared(1.0, 1.0, 2.0, 0.9), row)
    plan.check([p])
    plan.update([p], step)
    step.sums = plan.sums
    plan.finish([p], step, last=True)


class TritonPlan(DevicePlan):
    """The contract of :class:`prodigy_fused.step.Plan`."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        p = slots[0].param
        super().__init__(slots, _tensor_list(p.device))
        from ..triton_kernels import kernels

        self._kernels = kernels
        types = {"T": arithmetic(p), "X": p.dtype, "S": slots[0].state["exp_avg_sq"].dtype}
        self._types = {name: getattr(kernels.tl, str(dtype).removeprefix("torch.")) for name, dtype in types.items()}
        self._block = SIZES.block * 4 // arithmetic(p).itemsize
        words, owners = self._rows(slots)
        self._chunks = len(owners)
        table = self._upload_table(8 * len(words + owners), _writer((words + owners).tobytes())).view(torch.int64)
        self._tensors, self._owners = table[: len(words)], table[len(words) :]
        self._programs = min(max(1, self._chunks), PROGRAMS_PER_UNIT * _units(self.device))
        self._partials = self.sums.new_empty(2 * self._chunks)
        self._counters = torch.zeros(2, dtype=torch.int32, device=self.device)
        self._packed = b""
        self._views: dict[str, Tensor] = {}

    def _rows(self, slots: Sequence[Slot]) -> tuple[array[int], array[int]]:
        """The words of all tensors; and of every chunk, the tensor it belongs to."""
        words, owners = array("Q"), array("Q")  # as in addresses.py
        for i, slot in enumerate(slots):
            state, order = slot.state, memory_order(slot.param)
            stands_for_zero = state["p0"].dim() == 0 and (slot.slice_p > 1 or slot.param.dim() > 0)
            arrays = [slot.param, *map(state.get, STATES[:3]), None if stands_for_zero else state["p0"]]
            arrays.append(state["delta"] if slot.low_precision == "displacement" else None)
            addresses = [0 if t is None else t.data_ptr() for t in arrays]
            sizes = [slot.param.numel(), slot.slice_p, slot.group, len(owners)]
            rounding = [slot.index, slot.low_precision == "stochastic"]
            strides = [[pair[which] for pair in order] for which in (0, 1)]
            words.extend(addresses + sizes + rounding + [len(order), 0])
            for row in strides:
                words.extend(row + [0] * (compiled.MAX_DIMS - len(row)))
            owners.extend([i] * -(-slot.param.numel() // SIZES.chunk))
        return words, owners

    def update(self, grads: list[Tensor | None], step: Step) -> None:
        with self._guard():
            packed = self._pack(step)
            self._upload_step(len(packed), _writer(packed), packed != self._packed)
            self._packed = packed
            if not self._views:
                self._views = self._cut(len(step.hypers))
            self._launch(self._kernels.prodigy_update_kernel, step, self.sums, self._partials, LANES=SIZES.lanes)

    def finish(self, grads: list[Tensor | None], step: Step, last: bool) -> None:
        with self._guard():
            self._launch(self._kernels.prodigy_finish_kernel, step, step.sums, int(last))

    def _pack(self, step: Step) -> bytes:
        shared = step.shared
        numbers = shared.d0, shared.d_coef, shared.growth_rate, shared.beta3, step.grad_scale
        groups = [GROUP.pack(*h, *_place("lr", lr)) for h, lr in zip(step.hypers, self._lrs(step), strict=True)]
        addresses: bytes = self._plan.addresses()
        return b"".join([SHARED.pack(*numbers, *_place("grad_scale", step.device_scale)), *groups, addresses])

    def _cut(self, groups: int) -> dict[str, Tensor]:
        """The parts of the table of a step, which stays where it is as long as the plan is."""
        ends = SHARED.size, SHARED.size + GROUP.size * groups
        shared, rows, grads = self._step_table.tensor_split(ends)
        return {
            "shared": shared.view(torch.float64),
            "groups": rows.view(torch.float64),
            "grads": grads.view(torch.int64),
            "found_inf": torch.zeros(1, dtype=torch.float32, device=self.device),
        }

    def _launch(self, kernel: Any, step: Step, sums: Tensor, more: Any, **sizes: int) -> None:
        amp = {} if step.found_inf is None else {"found_inf": step.found_inf}
        kernel[(self._programs,)](
            self._tensors, self._owners, step.row, sums, self._counters, more, self._chunks,
            **{**self._views, **amp, **sizes, **self._types},
            CHUNK=SIZES.chunk,
            BLOCK=self._block,
            num_warps=SIZES.warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def _tensor_list(device: torch.device) -> Any:
    """The one in C++, where there is one that knows such devices."""
    known = device.type == "cpu" or (device.type == "cuda" and not torch.version.hip)
    return _C.TensorList if known and not compiled.MISSING else TensorList


@cache
def _units(device: torch.device) -> int:
    """The multiprocessors of a GPU."""
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return torch.cuda.get_device_properties(device).multi_processor_count


def _place(name: str, value: Tensor | None) -> tuple[int, int]:
    """Where the device finds a number, and its bits; zeros if the host has it."""
    if value is None:
        return 0, 0
    if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be a number or a float32 or float64 tensor with one element")
    return value.data_ptr(), 8 * value.itemsize


def _writer(data: bytes) -> Callable[[int], Any]:
    return lambda to: ctypes.memmove(to, data, len(data))


make_plan = TritonPlan
