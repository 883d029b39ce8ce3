"""The Triton backend: the CUDA backend's step where there is no nvcc, and on AMD and Intel GPUs (triton_kernels/).

Triton is imported when a parameter on a GPU asks for it, not before. Its kernels are compiled once, and kept on disk
by Triton: nothing that changes between steps is a constant of theirs.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from ctypes import memmove
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import estimate, hyper, options
from ..options import Group
from ..record import STEP
from ..state import KEYS
from ..step import BucketKey, Slot, Step
from . import native
from .elementwise import arithmetic
from .gpu import GpuPlan
from .tensor_list import TensorList, memory_order

if not native.MISSING:
    from .. import _C

COMPILED = ONE_PASS = READS_DEVICE = True
MINIMUM_VERSION = (3, 6)  # older ones are untested
PROGRAMS_PER_MULTIPROCESSOR = 8  # more than are resident: 3 or 4, by registers


class Sizes(NamedTuple):
    """Constants of the kernels; chosen, not tuned."""

    chunk: int = 1 << 13  # elements
    block: int = 1 << 9  # elements that a program takes at a time, 4 a thread; in float64 half as many
    lanes: int = 1 << 9  # of the last sum
    warps: int = 4


SIZES = Sizes()


def missing(device: torch.device) -> str | None:
    """Returns what would have to be installed to use Triton on this GPU; None if nothing, or if this is no GPU."""
    return problem(device) if device.type in ("cuda", "xpu") else None


def unsupported(p: Tensor, group: Group) -> str | None:
    """Returns why this backend cannot take the parameter, and the remedy; None if it can."""
    if p.device.type not in ("cuda", "xpu"):
        return f"the parameter is on {p.device}, not on a GPU"
    return native.unfit(p, group) or problem(p.device)


@cache
def problem(device: torch.device) -> str | None:
    """Returns why Triton cannot run the kernels on ``device``, and the remedy; None if it can. Compiles them."""
    try:
        from triton import __version__ as version
    except ImportError as error:
        return f"Triton is missing ({error}): pip install triton, or use fused=False"
    if tuple(map(int, version.split(".")[:2])) < MINIMUM_VERSION:
        oldest = ".".join(map(str, MINIMUM_VERSION))
        return f"Triton {version} is too old: install {oldest} or newer, or use fused=False"
    if os.environ.get("TRITON_INTERPRET") == "1":
        # It would read and write this device's memory as if it were the host's.
        return "TRITON_INTERPRET=1 is set, and the interpreter follows no GPU addresses: unset it, or use fused=False"
    try:
        try_out(device)
    except native.LayoutError as error:
        return f"the Triton kernels are of other sources ({error}): reinstall prodigy-fused, or use fused=False"
    except Exception as error:  # whatever a compiler, a linker or a driver may raise
        reason = next(iter(str(error).splitlines()), "")
        return (
            f"Triton {version} cannot compile its kernels here ({type(error).__name__}: {reason}): "
            "it needs a C compiler (gcc or clang, on the path or in CC); or use fused=False"
        )
    return None


def try_out(device: torch.device) -> None:
    """Compiles both kernels by running a step on an empty tensor; the compiled kernels are cached."""
    p = torch.empty(0, dtype=torch.float32, device=device)
    key = BucketKey("triton", str(device), "float32", "float32", sampled=False, displaced=False, counted=True)
    plan = TritonPlan(key, [Slot(0, p, dict.fromkeys(KEYS, p), 0, 1)], 1)
    group = options.defaults()
    rows = torch.tensor([[*estimate.initial(1.0).values()]], dtype=torch.float64, device=device)
    step = Step([hyper.hyper_of(group)], hyper.estimate_options_of([group]), rows, rows)
    plan.load_gradients([p])
    plan.update(step)
    step.sums = plan.sums
    plan.finish(step, last=True)


@cache
def _kernels() -> Any:
    """Returns the module of the kernels, and imports Triton with it.

    Raises:
        LayoutError: the kernels read other words than this Python writes; names them.
    """
    from ..triton_kernels import kernels, tables

    native.check_layout(tables, native.RECORD)
    return kernels


class TritonPlan(GpuPlan):
    """A plan, as :class:`prodigy_fused.step.Plan` describes it."""

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int) -> None:
        p = slots[0].param
        super().__init__(key, slots, estimates, _tensor_list(p.device))
        self._kernels = _kernels()
        words = {"T": str(arithmetic(p)).removeprefix("torch."), "X": key.dtype, "S": key.state_format}
        self._types = {name: getattr(self._kernels.tl, word) for name, word in words.items()}
        self._block = SIZES.block * 4 // arithmetic(p).itemsize
        self._estimates = estimates
        self.upload_tables()

    def upload_tables(self) -> None:
        slots = self.slots
        rows, owners = self._rows(slots)
        self._chunks = len(owners)
        ranges = _ranges(slots, self._estimates).tobytes()
        self._ranges = self._upload_table(len(ranges), lambda to: memmove(to, ranges, len(ranges))).view(torch.int64)
        table = (rows + owners).tobytes()
        table_on_device = self._upload_table(len(table), lambda to: memmove(to, table, len(table))).view(torch.int64)
        self._tensors, self._owners = table_on_device[: len(rows)], table_on_device[len(rows) :]
        self._programs = min(max(1, self._chunks), PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(self.device))
        self._partials = self.sums.new_empty(2 * self._chunks)
        self._counters = torch.zeros(2, dtype=torch.int32, device=self.device)
        self._views: dict[str, Tensor] = {}

    def _rows(self, slots: Sequence[Slot]) -> tuple[array[int], array[int]]:
        """Returns the rows of all tensors; and of every chunk, the tensor it belongs to."""
        from ..triton_kernels import tables

        rows, owners = array("Q"), array("Q")  # unsigned, as in tensor_list.py
        for i, slot in enumerate(slots):
            p, state, order = slot.param, slot.state, memory_order(slot.param)
            x0 = state.get("p0")
            stands_for_zero = x0 is not None and x0.dim() == 0 and (slot.slice_p > 1 or p.dim() > 0)
            row = tables.Tensor(
                x=p.data_ptr(),
                m=_address(state.get("exp_avg")),
                v=_address(state["exp_avg_sq"]),
                s=_address(state.get("s")),  # none: no samples
                x0=0 if stands_for_zero else _address(x0),
                delta=_address(state["delta"]) if slot.low_precision == "displacement" else 0,
                numel=p.numel(),
                slice_p=slot.slice_p,
                group=slot.group,
                first_chunk=len(owners),
                index=slot.random_index,
                stochastic=slot.low_precision == "stochastic",
                dims=len(order),
            )
            rows.extend(tables.tensor_row(row, order))
            owners.extend([i] * _chunks(slot))
        return rows, owners

    def update(self, step: Step) -> None:
        with self._guard():
            self._upload_step(step, step.record + self._native.gradient_words())
            if not self._views:
                self._views = self._cut(len(step.record))
            arguments = self._partials, self._chunks, self._ranges
            self._launch(self._kernels.prodigy_update_kernel, step, self.sums, *arguments, LANES=SIZES.lanes)

    def finish(self, step: Step, last: bool) -> None:
        with self._guard():
            arguments = int(last), self._chunks, step.new_rows
            self._launch(self._kernels.prodigy_finish_kernel, step, step.sums, *arguments)

    def _cut(self, record_bytes: int) -> dict[str, Tensor]:
        """Returns the parts of the step table, whose address and size are constant for the life of the plan."""
        record, groups, grads = self._step_table.tensor_split((STEP.size, record_bytes))
        return {
            "record": record.view(torch.float64),
            "groups": groups.view(torch.float64),
            "grads": grads.view(torch.int64),
        }

    def _launch(self, kernel: Any, step: Step, sums: Tensor, *arguments: Any, **sizes: int) -> None:
        kernel[(self._programs,)](
            self._tensors, self._owners, step.rows, sums, self._counters, *arguments, len(step.rows),
            **{**self._views, **sizes, **self._types},
            CHUNK=SIZES.chunk,
            BLOCK=self._block,
            num_warps=SIZES.warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def _chunks(slot: Slot) -> int:
    return -(-slot.param.numel() // SIZES.chunk)


def _ranges(slots: Sequence[Slot], estimates: int) -> array[int]:
    """Returns the first chunk of each estimate's tensors, and the number of all chunks."""
    sizes = [0] * estimates
    for slot in slots:
        sizes[slot.estimate] += _chunks(slot)
    return array("Q", accumulate(sizes, initial=0))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _tensor_list(device: torch.device) -> Any:
    """Returns the class in C++, if it was built and knows such devices, else the one in Python."""
    known = device.type == "cpu" or (device.type == "cuda" and not torch.version.hip)
    return _C.TensorList if known and not native.MISSING else TensorList


@cache
def _multiprocessors(device: torch.device) -> int:
    """Returns how many multiprocessors a GPU has."""
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return torch.cuda.get_device_properties(device).multi_processor_count


make_plan = TritonPlan
