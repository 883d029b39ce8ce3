"""The CUDA kernels as compiled, on a machine without a GPU: registers, spills, 16-byte accesses, the import."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import sass
import torch

from prodigy_fused.backends import cuda, native

ARCHITECTURES = ("80", "90", "100", "120")
OF_CODES = (*ARCHITECTURES, "89")  # of the kernels for state in 8 bits


class Kernel(NamedTuple):
    """What a kernel may take, on every architecture; and instructions per element, on sm_90."""

    registers: int
    local: int  # bytes: a spilled register is in local memory. A few words once a tile or a chunk do no harm
    instructions: int
    usual: int | None = None  # of them, where what is rare has ways of its own


# By kernel, type of the parameters, of the state, D for a displacement or L for 8 more bits, and sampling. With these
# registers, as many blocks fit a multiprocessor as the fastest prototypes had; the instructions are a tenth more than
# there are, in the longest way: with weight decay of both kinds, of which a step has none or one (3 to 5 fewer). Of
# codes, what is not finite or too large has ways of its own: there the shortest way is what is usual.
KERNELS = {
    "update float float EveryElement": Kernel(80, 0, 59),
    "update float float EveryPth": Kernel(64, 0, 47),
    "update float float NoElement": Kernel(64, 0, 48),
    "update double double AnySampling": Kernel(128, 0, 113),
    "update BFloat16 float EveryElement": Kernel(96, 0, 63),
    "update BFloat16 float EveryPth": Kernel(80, 0, 51),
    "update BFloat16 float NoElement": Kernel(80, 0, 51),
    "update BFloat16 BFloat16 EveryElement": Kernel(96, 0, 62),
    "update BFloat16 BFloat16 EveryPth": Kernel(80, 0, 47),
    "update BFloat16 BFloat16 NoElement": Kernel(80, 0, 47),
    "update BFloat16 float D EveryElement": Kernel(128, 0, 66),
    "update BFloat16 float L EveryElement": Kernel(128, 0, 71),
    "update BFloat16 float L EveryPth": Kernel(80, 0, 61),
    "update BFloat16 BFloat16 L EveryElement": Kernel(96, 0, 72),
    "update BFloat16 BFloat16 L EveryPth": Kernel(80, 0, 58),
    "update Float16 float EveryElement": Kernel(128, 0, 71),
    "update Float16 float EveryPth": Kernel(80, 8, 60),
    "update Float16 float D EveryElement": Kernel(128, 0, 63),
    "update float BFloat16 EveryElement": Kernel(96, 0, 55),
    "update float BFloat16 EveryPth": Kernel(80, 0, 40),
    "update float Codes EveryElement": Kernel(96, 0, 128, 105),
    "update float Codes EveryPth": Kernel(72, 8, 70, 59),
    "update BFloat16 Codes EveryElement": Kernel(96, 0, 136, 107),
    "update BFloat16 Codes EveryPth": Kernel(80, 0, 77, 61),
    "update BFloat16 Codes L EveryElement": Kernel(96, 0, 156, 126),
    "update BFloat16 Codes L EveryPth": Kernel(80, 0, 100, 75),
    "update AnyNumber Codes AnySampling": Kernel(128, 0, 183),
    "update AnyNumber AnyNumber AnySampling": Kernel(128, 0, 199),
    "finish float float AnySampling": Kernel(128, 0, 62),
    "finish double double AnySampling": Kernel(128, 0, 90),
    "finish BFloat16 float AnySampling": Kernel(128, 0, 61),
    "finish BFloat16 BFloat16 AnySampling": Kernel(128, 0, 45),
    "finish AnyNumber Codes AnySampling": Kernel(128, 0, 111),
    "finish AnyNumber AnyNumber AnySampling": Kernel(128, 0, 133),
}
SIZE = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2, "Codes": 1, "AnyNumber": 4}


def per_thread(kernel):
    """Elements that a thread takes at a time."""
    x, state = kernel.split()[1:3]
    if state == "Codes":
        return 8
    return 4 if x == "AnyNumber" else 16 // min(SIZE[x], SIZE[state])


def kernel_name(mangled):
    """The key in KERNELS."""
    found = re.search(r"(update|finish)_kernel.*(Stored|Coded)I(.*?)LNS0_6BesideE(\d)E+NS0_\d+(\w+?)ELi", mangled)
    kernel, storage, types, beside, sampling = found.groups()
    names = [
        {"f": "float", "d": "double"}.get(t) or t for t in re.findall(r"[fd]|S4_|(?<=\d)[A-Z][A-Za-z]+\d*(?=E)", types)
    ]
    names = [names[0] if name == "S4_" else name for name in names] + ["Codes"] * (storage == "Coded")
    return " ".join([kernel, *names, *["D"] * (beside == "1"), *["L"] * (beside == "2"), sampling])


REQUIRED = "cuda-build" in os.environ.get("PRODIGY_FUSED_REQUIRE", "").split(",")


def dump(*options):
    """Returns the output of cuobjdump, of a toolkit or of PyPI, about the compiled module."""
    if native.MISSING or cuda._C.CUDA is None:
        (pytest.fail if REQUIRED else pytest.skip)("_C has no CUDA half here")
    places = [Path(folder, "nvidia/cu13/bin/cuobjdump") for folder in sys.path]
    places += [Path(place) for place in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump") if place]
    tool = next((place for place in places if place.is_file()), None)
    if tool is None:
        (pytest.fail if REQUIRED else pytest.skip)("no cuobjdump")
    path = os.pathsep.join([*filter(None, [disassembler()]), os.environ["PATH"]])
    command = [tool, *options, cuda._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout


def disassembler():
    """The folder of nvdisasm, of a toolkit or of PyPI."""
    if found := shutil.which("nvdisasm"):
        return str(Path(found).parent)
    return next(
        (str(f) for folder in sys.path if (f := Path(folder, "nvidia/cu13/bin")).joinpath("nvdisasm").is_file()), None
    )


def report(text):
    """(architecture, kernel, registers, bytes of local memory) of every kernel; a spilled register is in the latter."""
    for part in text.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = sm_(\d+)", part).group(1)
        for name, *numbers in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part):
            registers, stack, local = map(int, numbers)
            yield architecture, kernel_name(name), registers, stack + local


def test_registers_and_spills(capsys):
    """Prints, for each architecture, the registers of a kernel and its bytes of local memory."""
    rows = sorted(report(dump("-res-usage")))
    with capsys.disabled():
        for kernel in KERNELS:
            print(f"\n  {kernel:38} ", *(f"sm_{a}: {r:3} + {n:2}" for a, k, r, n in rows if k == kernel), end="")
    built = ARCHITECTURES if REQUIRED else sorted({a for a, *_ in rows})  # perhaps for the GPU at hand alone
    wanted = [(a, k) for k in KERNELS for a in (OF_CODES if REQUIRED and "Codes" in k else built)]
    assert sorted((a, k) for a, k, *_ in rows) == sorted(wanted)
    assert [row for row in rows if row[2] > KERNELS[row[1]].registers or row[3] > KERNELS[row[1]].local] == []


def accesses(kernel):
    """The 16-byte loads and stores of one pack: for each, the least number."""
    kind, x, state, *beside, sampling = kernel.split()
    if state == "Codes":  # which are moved by 8 bytes
        return 2 * 8 * SIZE[x] // 16, 8 * SIZE[x] // 16
    if x == "AnyNumber":
        return (6, 4) if kind == "update" else (4, 1)  # of its float32 arrays
    of = {name: max(1, per_thread(kernel) * SIZE[name] // 16) for name in (x, state, "float")}
    if kind == "finish":
        return of[x] + 2 * of[state], of[x]
    every = sampling == "EveryElement" or sampling == "AnySampling"
    delta = of["float"] * (beside == ["D"])
    return (2 + every) * of[x] + (2 + every) * of[state] + delta, of[x] + (2 + every) * of[state] + delta


def test_16_byte_accesses_to_global_memory():
    bodies = dump("-ptx").split(".entry")[1:]
    if not bodies and not REQUIRED:
        pytest.skip("built for the GPU at hand alone, without PTX")
    for body in bodies:
        kernel = kernel_name(body.split("(")[0])
        found = [len(re.findall(rf"{what}\.global\.(?:v4\.[fbu]32|v2\.[fbu]64)", body)) for what in ("ld", "st")]
        assert found[0] >= accesses(kernel)[0] and found[1] >= accesses(kernel)[1], (kernel, found, accesses(kernel))


def test_instructions_per_element(capsys):
    """Of the round of a loop that takes a pack: the way with the most of them, which is that with momentum; and the one
    with the fewest."""
    if disassembler() is None:
        (pytest.fail if REQUIRED else pytest.skip)("no nvdisasm, which cuobjdump calls")
    rows = {}
    for name, code in sass.kernels(dump("-sass", "-arch", "sm_90")):
        kernel = kernel_name(name)
        rows[kernel] = [count(code) / per_thread(kernel) for count in (sass.longest_round, sass.shortest_round)]
    with capsys.disabled():
        for kernel, (most, fewest) in sorted(rows.items()):
            usual = f"{most:5.1f}" if KERNELS[kernel].usual is None else f"{most:5.1f} ({fewest:.1f})"
            print(f"\n  {kernel:42} {usual} instructions per element", end="")
    assert rows.keys() == KERNELS.keys()
    assert [k for k, (most, _) in rows.items() if not 0 < most <= KERNELS[k].instructions] == []
    assert [k for k, (_, few) in rows.items() if not 0 < few <= (KERNELS[k].usual or KERNELS[k].instructions)] == []


@pytest.mark.skipif(native.MISSING is not None or cuda._C.CUDA is None, reason="_C has no CUDA half here")
def test_without_a_gpu_it_imports_and_says_what_is_wrong():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "CUDA" in cuda._C.cuda_problem()
    code = """
import torch
from prodigy_fused import _C, Prodigy
from prodigy_fused.hyper import estimate_options_of, hyper_of
from prodigy_fused.step import Slot, Step
p = torch.nn.Parameter(torch.ones(3))
opt = Prodigy([p], backend="reference")
p.grad = torch.ones(3)
opt.step()
plan = _C.CudaPlan([Slot(0, p, opt.state[p], 0, 1)], torch.Tensor, "float32", 1)
plan.load_gradients([p.grad])
row = torch.zeros(8, dtype=torch.float64)
groups = opt.param_groups
record = Step([hyper_of(g) for g in groups], estimate_options_of(groups), row[None], row[None]).record
addresses = dict.fromkeys(["table", "step", "partials", "arrived", "sums", "row"], row.data_ptr())
plan.update(record, **addresses, stream=0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"RuntimeError: prodigy_fused: update_kernel failed: .*\w", result.stderr), result.stderr
