"""The Triton backend: the CUDA backend's step where there is no nvcc, and on AMD and Intel GPUs (triton_kernels/).

Triton is imported when a parameter on a GPU asks for it, not before. Its kernels are compiled once, and kept on disk
by Triton: nothing that changes between steps is a constant of theirs, but for the type of the gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from ctypes import memmove
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import estimate, hyper, options
from ..eight_bits import BLOCK as CODE_BLOCK
from ..options import Group
from ..state import KEYS
from ..step import BucketKey, Slot, Step
from . import native
from .gpu import GpuPlan
from .tensor_list import TensorList
from .triton_tables import chunks_of, cut, ranges_of, rows_of, signed

if not native.MISSING:
    from .. import _C

COMPILED = ONE_PASS = READS_DEVICE = True
MINIMUM_VERSION = (3, 6)  # 3.5 flushes subnormal numbers in roots and quotients, and lacks what the kernels use
# Where a compiled kernel does not say how many are resident: more than that cost nothing.
PROGRAMS_PER_MULTIPROCESSOR = 8
REGISTERS = 1 << 16  # of a multiprocessor, on every NVIDIA GPU that Triton knows


class Sizes(NamedTuple):
    """Constants of the kernels of a bucket."""

    chunk: int  # elements
    block: int  # elements that a program takes at a time
    resident: int  # programs that a multiprocessor's registers are to suffice for
    lanes: int = 1 << 9  # of the last sum
    warps: int = 4


def sizes(key: BucketKey) -> Sizes:
    """Returns the constants of a bucket's kernels.

    A thread takes 16 bytes at a time of the widest array that is written: wider stores have gaps, which Triton closes
    by a detour through shared memory. A warp takes a whole block of codes (triton_kernels/codes.py). A chunk with
    samples is to stay in the cache (Note [Samples first] of triton_kernels/samples.py). The programs are as many as
    registers allow without a spill in the walk over aligned elements, or with few: tests/test_triton_compiled.py.
    """
    itemsize = getattr(torch, key.dtype).itemsize
    chunk = (1 << 14) // itemsize if key.sampled else 1 << 13
    if key.state_format == "8bit":
        return Sizes(chunk, 4 * CODE_BLOCK, resident=5)
    widest = max(itemsize, getattr(torch, key.state_format).itemsize, 4 if key.displaced else 0)
    return Sizes(chunk, 2048 // widest, resident=5 if widest == 2 or key.sampled else 6)


def registers(size: Sizes) -> int:
    """Returns how many registers a thread may have for so many programs to be resident, on an NVIDIA GPU."""
    return REGISTERS // (32 * size.warps * size.resident) // 8 * 8


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
        return f"Triton {version} is too old: install {oldest} or newer (torch 2.10 has it), or use fused=False"
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
    key = BucketKey(
        "triton",
        str(device),
        "float32",
        "float32",
        sampled=False,
        displaced=False,
        extended=False,
        frozen=False,
        counted=True,
    )
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
        super().__init__(key, slots, estimates, _tensor_list(slots[0].param.device))
        self._kernels = _kernels()
        self._sizes = sizes(key)
        self._constants = self._constants_of(key)
        self._estimates = estimates
        self.upload_tables()

    def upload_tables(self) -> None:
        slots = self.slots
        rows, owners = rows_of(slots, self._sizes.chunk)
        self._chunks = len(owners)
        self._firsts = [*accumulate((chunks_of(slot, self._sizes.chunk) for slot in slots), initial=0)]
        ranges = ranges_of(slots, self._estimates, self._sizes.chunk).tobytes()
        self._ranges = self._upload_table(len(ranges), lambda to: memmove(to, ranges, len(ranges))).view(torch.int64)
        table = (rows + owners).tobytes()
        table_on_device = self._upload_table(len(table), lambda to: memmove(to, table, len(table))).view(torch.int64)
        self._tensors, self._owners = table_on_device[: len(rows)], table_on_device[len(rows) :]
        self._flat_partials = self.sums.new_empty(2 * self._chunks)  # first the chunks' dots, then their norms
        self._partials = self._flat_partials.view(2, -1).t()
        self._counters = torch.zeros(2, dtype=torch.int32, device=self.device)
        self._views: tuple[Tensor, ...] = ()
        self._launchers: dict[tuple[Any, Any], Callable[..., Any]] = {}

    def _constants_of(self, key: BucketKey) -> dict[str, Any]:
        """Returns the constants of the kernels by name, but for G, which is one of a launch."""
        tl, elements = self._kernels.tl, self._kernels.elements
        samples = elements.NONE if key.frozen else elements.SOME if key.sampled else elements.ALL
        kept = elements.DISPLACED if key.displaced else elements.EXTENDED if key.extended else elements.AS_IT_IS
        return {
            "T": tl.float64 if key.dtype == "float64" else tl.float32,
            "X": getattr(tl, key.dtype),
            "S": tl.uint8 if key.state_format == "8bit" else getattr(tl, key.state_format),
            "G": getattr(tl, key.dtype),
            "SAMPLES": samples.value,
            "KEPT": kept.value,
            "CHUNK": self._sizes.chunk,
            "BLOCK": self._sizes.block,
        }

    def update(self, step: Step) -> None:
        self._load(step, self._gradient_words())
        self._update(step, 0, self._chunks, (0, 0), adds_up=1)

    def begin(self, step: Step) -> None:
        self._load(step, self._words_without_gradients())
        super().begin(step)

    def update_one(self, step: Step, at: int, grad: Tensor) -> None:
        begin, end = self._first_chunks()[at : at + 2]

        def update(laid_out: Tensor) -> bool:
            if not self._native.fits(at, laid_out):
                return False
            bits = 8 * laid_out.itemsize
            self._constants["G"] = self._type_of_gradients([bits])
            if begin < end:
                self._update(step, begin, end, (signed(laid_out.data_ptr()), bits), adds_up=0)
            return True

        self._update_laid_out(at, grad, update)

    def add_up(self, step: Step) -> None:
        self._load(step, self._gradient_words())
        self._update(step, self._chunks, self._chunks, (0, 0), adds_up=1)

    def _load(self, step: Step, gradients: bytes) -> None:
        """Uploads the numbers of a step and the addresses of its gradients."""
        with self._guard():
            self._upload_step(step, step.record, gradients)
        if not self._views:
            self._views = cut(self._step_table, len(step.record))
        self._constants["G"] = self._type_of_gradients(gradients[8::16])  # the lowest byte of each one's bits

    def _update(self, step: Step, begin: int, end: int, only: tuple[int, int], adds_up: int) -> None:
        arguments = begin, end, *only, adds_up, self._flat_partials, self._chunks, self._ranges
        with self._guard():
            self._in_order()
            self._launch(self._kernels.prodigy_update_kernel, step, self.sums, *arguments, LANES=self._sizes.lanes)

    def _first_chunks(self) -> Sequence[int]:
        return self._firsts

    def partials(self) -> Any:
        return super().partials(), self._counters  # which say whether some x waits for *finish*

    def put_partials(self, partials: Any) -> None:
        rows, counters = partials
        super().put_partials(rows)
        self._counters.copy_(counters)

    def finish(self, step: Step, last: bool) -> None:
        with self._guard():
            arguments = int(last), self._chunks, step.new_rows
            self._launch(self._kernels.prodigy_finish_kernel, step, step.sums, *arguments)

    def _type_of_gradients(self, bits: Collection[int]) -> Any:
        """Returns the constant G: for parameters of 16 bits, gradients may all be of 32 bits, or some of them."""
        own = self._constants["X"]
        if own.primitive_bitwidth != 16 or 32 not in bits:
            return own
        return None if 16 in bits else self._kernels.tl.float32

    def _launch(self, kernel: Any, step: Step, sums: Tensor, *arguments: Any, **more: int) -> None:
        constants = {**self._constants, **more}
        arguments = (
            self._tensors, self._owners, step.rows, sums, self._counters, *arguments, len(step.rows), *self._views,
            *constants.values(),
        )  # fmt: skip
        launch = self._launchers.get((kernel, constants["G"]))
        if launch is None:
            programs = max(1, min(self._chunks, PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(self.device)))
            options = {"num_warps": self._sizes.warps, "enable_fp_fusion": False, **self._options()}
            compiled = kernel[(programs,)](*arguments, **options)
            self._keep_launcher((kernel, constants["G"]), compiled)
        else:
            launch(*arguments)

    def _options(self) -> dict[str, int]:
        """Returns the options that only compilers for NVIDIA's GPUs know."""
        return {"maxnreg": registers(self._sizes)} if _is_nvidia(self.device) else {}

    def _keep_launcher(self, key: tuple[Any, Any], compiled: Any) -> None:
        """Keeps what launches a compiled kernel without Triton's looking for it, with as many programs as fit."""
        if _is_nvidia(self.device):
            threads = 32 * compiled.metadata.num_warps
            resident = REGISTERS // (threads * (-(-compiled.n_regs // 8) * 8))
            programs = max(1, min(self._chunks, resident * _multiprocessors(self.device)))
            self._launchers[key] = compiled[(programs, 1, 1)]


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip


def _tensor_list(device: torch.device) -> Any:
    """Returns the class in C++, if it was built and knows such devices, else the one in Python."""
    known = device.type == "cpu" or _is_nvidia(device)
    return _C.TensorList if known and not native.MISSING else TensorList


@cache
def _multiprocessors(device: torch.device) -> int:
    """Returns how many multiprocessors a GPU has."""
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return torch.cuda.get_device_properties(device).multi_processor_count


make_plan = TritonPlan
