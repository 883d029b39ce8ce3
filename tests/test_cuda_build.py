"""The CUDA kernels as compiled, on a machine without a GPU: registers, spills, 16-byte accesses, the import."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prodigy_fused.backends import cuda, native

ARCHITECTURES = ("80", "90", "100", "120")
# Of float32, of float64, and of mixed types with float32 arithmetic.
NUMBERS = ("IfLb0", "IdLb0", "IfLb1")
KERNELS = {f"{kernel}_kernel{number}": 128 for kernel in ("update", "finish") for number in NUMBERS}
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
    return subprocess.run([tool, *options, cuda._C.__file__], capture_output=True, text=True, check=True).stdout


def report(text):
    """(architecture, kernel, registers, bytes of local memory) of every kernel; a spilled register is in the latter."""
    for part in text.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = sm_(\d+)", part).group(1)
        for name, *numbers in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part):
            registers, stack, local = map(int, numbers)
            yield architecture, next(kernel for kernel in KERNELS if kernel in name), registers, stack + local


def test_registers_and_spills(capsys):
    rows = list(report(dump("-res-usage")))
    with capsys.disabled():
        for row in rows:
            print("\n  sm_{}: {:19} {:3} registers, {} bytes of local memory".format(*row), end="")
    built = set(ARCHITECTURES) if REQUIRED else {a for a, *_ in rows}  # perhaps for the GPU at hand alone
    assert {(a, k) for a, k, *_ in rows} == {(a, k) for a in built for k in KERNELS}
    assert [row for row in rows if row[3] > 0 or row[2] > KERNELS[row[1]]] == []


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [("update_kernelIfLb0", "v4.f32"), ("update_kernelIdLb0", "v2.f64"), ("update_kernelIfLb1", "v4.f32")],
)
def test_16_byte_accesses_to_global_memory(kernel, kind):
    bodies = dump("-ptx").split(".entry")[1:]
    if not bodies and not REQUIRED:
        pytest.skip("built for the GPU at hand alone, without PTX")
    body = next(part for part in bodies if kernel in part.split("(")[0])
    # x, grad, m, v, s, x0, and the four that are written; and once more x, grad, m, v for slice_p > 1.
    assert len(re.findall(rf"ld\.global\.{kind}", body)) >= 10
    assert len(re.findall(rf"st\.global\.{kind}", body)) >= 7


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
    assert re.search(r"RuntimeError: prodigy_fused: update_kernel<float> failed: .*\w", result.stderr), result.stderr
