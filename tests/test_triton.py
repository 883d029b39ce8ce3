"""The Triton backend besides what the common suite and ``test_emulation.py`` ask: compilation, choice, tables."""

import json
import struct
import sys

import pytest
import torch
from kernel_runs import agree, start, train
from processes import python
from toolbox import device_of

from prodigy_fused import Prodigy, backends, hyper, options, record
from prodigy_fused.backends import native, tensor_list, triton

needs_triton = pytest.mark.skipif(device_of("triton") is None, reason="no Triton here")


# -- compilation, without a GPU ----------------------------------------------------------------------------------------

COMPILE = """
import json, re, sys
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prodigy_fused.backends.triton import SIZES
from prodigy_fused.triton_kernels import kernels

TYPES = dict.fromkeys(["tensors", "owners", "ranges", "grads"], "*i64") | {"counters": "*i32"}
TYPES |= dict.fromkeys(["last", "chunk_count", "estimate_count"], "i32")
rows = []
for kernel, types, target in json.loads(sys.argv[1]):
    function = getattr(kernels, kernel)
    T, X, S = (getattr(tl, name) for name in types)
    constants = dict(T=T, X=X, S=S, CHUNK=SIZES.chunk, BLOCK=SIZES.block * 32 // T.primitive_bitwidth)
    constants |= {"LANES": SIZES.lanes} if "LANES" in function.arg_names else {}
    signature = {name: TYPES.get(name, "*fp64") for name in function.arg_names if name not in constants}
    built = triton.compile(
        ASTSource(function, signature, constants), target=GPUTarget(*target),
        options={"num_warps": SIZES.warps, "enable_fp_fusion": False},
    )
    count = lambda pattern: len(re.findall(pattern, built.asm.get("ptx", "")))
    rows.append({
        "binary": len(built.asm.get("cubin") or built.asm.get("hsaco")),
        "loads": [count(r"ld\\.global\\." + kind) for kind in (r"v4\\.b32", r"v2\\.b64", r"v2\\.b32")],
        "stores": [count(r"st\\.global\\." + kind) for kind in (r"v4\\.b32", r"v2\\.b64", r"v2\\.b32")],
        "inexact": count(r"fma\\.rn\\.f|\\.ftz|\\.approx|div\\.full"),
        "exact": count(r"(sqrt|div)\\.rn\\.f%d" % T.primitive_bitwidth),
        # A barrier and no write behind it, then the atomic: what all threads wrote is there for the last program.
        "arrivals": count(r"bar\\.sync\\s+0;(?:(?!bar\\.sync|st\\.)[\\s\\S])*?atom\\.global\\.gpu\\.acq_rel\\.add"),
    })
print(json.dumps(rows))
"""
NVIDIA = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32)]
AMD = ("hip", "gfx942", 64)
UPDATE, FINISH = "prodigy_update_kernel", "prodigy_finish_kernel"
FLOAT32, FLOAT64, HALVES = ["float32"] * 3, ["float64"] * 3, ["float32", "bfloat16", "float32"]
# A thread's accesses to 4 elements, or to 2 of float64: of 16 bytes (in float64: the second), and of 8. Of x, grad, m,
# v, s, x0; with slice_p > 1 or a frozen d, of the first four; for 16 bits also delta, a float32 grad, x0 if frozen.
ACCESSES = {
    (UPDATE, *FLOAT32): ([14, 0, 0], [10, 0, 0]),
    (FINISH, *FLOAT32): ([4, 0, 0], [1, 0, 0]),
    (UPDATE, *FLOAT64): ([0, 14, 0], [0, 10, 0]),
    (FINISH, *FLOAT64): ([0, 4, 0], [0, 1, 0]),
    (UPDATE, *HALVES): ([13, 0, 8], [10, 0, 3]),
    (FINISH, *HALVES): ([4, 0, 3], [1, 0, 1]),
}


@needs_triton
def test_kernels_compile_to_16_byte_accesses_and_exact_arithmetic():
    targets = [(FLOAT32, target) for target in (*NVIDIA, AMD)] + [(FLOAT64, NVIDIA[1]), (HALVES, NVIDIA[1])]
    wanted = [(kernel, types, target) for kernel in (UPDATE, FINISH) for types, target in targets]
    for (kernel, types, target), row in zip(wanted, json.loads(python(COMPILE, json.dumps(wanted))), strict=True):
        assert row["binary"] > 1000, (kernel, target)
        if target is AMD:
            continue
        assert (row["loads"], row["stores"]) == ACCESSES[(kernel, *types)], (kernel, types, target)
        assert row["inexact"] == 0 and row["exact"] > 0, (kernel, types, target)
        assert row["arrivals"] == 1, (kernel, types, target)


COUNT = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from prodigy_fused import Prodigy
from prodigy_fused.backends import triton as backend

class Driver:  # of a GPU that is not there: kernels are compiled for it, and not launched
    get_current_device = staticmethod(lambda: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(Driver())
compiled, launches, run = set(), [], triton.runtime.JITFunction.run

def warm_up(self, *args, warmup, **kwargs):
    launches.append(self)
    compiled.add(run(self, *args, warmup=True, **kwargs))

triton.runtime.JITFunction.run = warm_up
backend.unsupported, backend._multiprocessors = lambda p, group: None, lambda device: 4

def steps(sizes, options, dtype=torch.float32):
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in sizes]
    opt = Prodigy(params, backend="triton", **options)
    changes = [{"lr": 0.5}, {"weight_decay": 0.1}, {"eps": 1e-6}, {"d": 0.01}, {"betas": (0.5, 0.9)}, {"d_coef": 2}]
    for change in [{}, *changes]:
        opt.param_groups[0].update(change)
        for i, p in enumerate(params):
            p.grad_dtype = None
            p.grad = torch.ones_like(p, dtype=torch.float32 if i % 2 else dtype)
        opt.step()

steps([3, 40, 17], {})
steps([1], {"slice_p": 3, "maximize": True})
steps([16] * 16, {"decouple": False, "use_bias_correction": True, "betas": (0.0, 0.9), "beta3": 0.5})
print(len(launches), len(compiled))
for mode in ("stochastic", "displacement", "nearest"):
    steps([3, 40, 17], {"low_precision": mode}, torch.bfloat16)
print(len(launches), len(compiled))
"""


@needs_triton
def test_nothing_that_changes_between_steps_compiles_anew():
    assert python(COUNT).split() == ["42", "2", "84", "4"]


# -- the choice --------------------------------------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """As far as the choice of a backend looks at it."""

    device = torch.device("cuda", 0)


def choose(**changes):
    group = {**options.defaults(), **changes}
    return backends.choose(torch.zeros(3).as_subclass(OnGpu), group)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(backends.get("cuda"), "unsupported", lambda p, group: "built without CUDA")


def test_on_a_gpu_it_is_chosen_where_cuda_was_not_built(monkeypatch, no_cuda):
    monkeypatch.setattr(triton, "problem", lambda device: None)
    for changes in ({}, {"fused": True}, {"backend": "triton"}):
        assert choose(**changes) == "triton"
    assert choose(fused=False) == "foreach"
    monkeypatch.setattr(backends.get("cuda"), "unsupported", lambda p, group: None)
    assert choose() == "cuda"


def test_a_triton_that_does_not_work_is_said_once_and_never_when_it_was_asked_for(monkeypatch, no_cuda, recwarn):
    monkeypatch.setattr(triton, "problem", lambda device: "Triton is out of order (test)")
    assert [choose(), choose()] == ["foreach", "foreach"]
    (warning,) = recwarn
    assert "foreach" in str(warning.message) and "out of order (test)" in str(warning.message)
    for changes in ({"fused": True}, {"backend": "triton"}):
        with pytest.raises(RuntimeError, match=r"triton: Triton is out of order \(test\)"):
            choose(**changes)


@pytest.mark.parametrize("reason", [None, "Triton is missing (test)"])
def test_a_parameter_that_does_not_fit_is_no_fault_of_triton(monkeypatch, no_cuda, recwarn, reason):
    monkeypatch.setattr(triton, "problem", lambda device: reason)
    backends._say_once.cache_clear()
    p = torch.zeros(3, 2)[:, 0].as_subclass(OnGpu)
    assert backends.choose(p, options.defaults()) == "foreach"
    assert not list(recwarn)


def raise_compile_error(device):
    raise OSError("Failed to find C compiler.\nmore")


@needs_triton
@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda m: m.setitem(sys.modules, "triton", None), ["missing", "pip install triton"]),
        (lambda m: m.delattr("triton.__version__"), ["missing", "pip install triton"]),
        (lambda m: m.setattr("triton.__version__", "3.1.0"), ["3.1.0 is too old", "3.6"]),
        (lambda m: m.setattr(triton, "try_out", raise_compile_error), ["Failed to find C compiler.)", "gcc"]),
    ],
    ids=["missing", "a folder of that name", "old", "no compiler"],
)
def test_why_triton_cannot_be_used(monkeypatch, break_it, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    break_it(monkeypatch)
    reason = triton.problem.__wrapped__(torch.device("cpu"))
    assert [word for word in (*words, "fused=False") if word not in reason] == []


@needs_triton
def test_the_interpreter_is_not_given_addresses_of_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "try_out", lambda device: None)
    assert "TRITON_INTERPRET=1 is set" in triton.problem.__wrapped__(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton.problem.__wrapped__(torch.device("cuda")) is None


def test_a_parameter_on_the_cpu_is_taken_only_when_the_tests_name_the_backend(monkeypatch):
    assert "not on a GPU" in backends.get("triton").unsupported(torch.zeros(1), {"backend": None})
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        assert "not on a GPU" in triton.unsupported(torch.zeros(1), {"backend": "triton"})


# -- tables ------------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("fields", ["ESTIMATE_FIELDS", "STEP_FIELDS", "GROUP_FIELDS"])
def test_a_field_that_only_one_side_has_fails_at_import(monkeypatch, fields):
    from prodigy_fused.triton_kernels import tables

    triton._kernels.__wrapped__()
    monkeypatch.setattr(tables, fields, getattr(tables, fields)[1:])
    with pytest.raises(ImportError, match=fields):
        triton._kernels.__wrapped__()


@needs_triton
def test_rows_are_as_long_as_the_host_packs_them_and_aligned_to_16_bytes():
    from prodigy_fused.triton_kernels import tables

    assert [record.STEP.size, record.GROUP.size] == [8 * tables.STEP_ROW_WORDS, 8 * tables.GROUP_ROW_WORDS]
    tensor = tables.Tensor(*range(100, 100 + len(tables.TENSOR_FIELDS)))
    row = tables.tensor_row(tensor, [(5, 1), (1, 7)])
    assert (row[: len(tensor)], len(row)) == (list(tensor), tables.TENSOR_ROW_WORDS)
    strides = row[tables.ORDER_WORD :]
    assert (strides[:3], strides[tables.MAX_DIMS :][:3], len(strides)) == ([5, 1, 0], [1, 7, 0], 2 * tables.MAX_DIMS)
    sizes = [tables.STEP_ROW_WORDS, tables.GROUP_ROW_WORDS, tables.TENSOR_ROW_WORDS, tables.ORDER_WORD]
    assert [words % 2 for words in sizes] == [0] * 4


# -- addresses ---------------------------------------------------------------------------------------------------------


def slots(dtype):
    tensors = [torch.zeros(4, 3), torch.zeros(5, 7).t(), torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    tensors = [t.to(dtype) for t in tensors]
    opt = Prodigy(tensors, backend="reference", low_precision="displacement")
    for p in tensors:
        p.grad = torch.ones_like(p)
    opt.step()
    return opt._runtime.plans.slots


@needs_triton
def test_addresses_may_have_the_highest_bit_set(monkeypatch):
    """As those of Intel GPUs have."""
    entries, address = slots(torch.float16), 2**64 - 4096
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: address)
    tensors = tensor_list.TensorList(entries, torch.Tensor, "float32", 1)
    assert tensors.load_gradients([entry.param.grad for entry in entries]) == -1
    assert tensors.gradient_words() == struct.pack("=2Q", address, 16) * 3
    words, *_ = triton.TritonPlan._rows(None, entries)
    assert list(words[:6]) == [*[address] * 4, 0, address]
    group = options.defaults()
    number = hyper.hyper_of(group)._replace(lr=torch.ones(()))
    packed = record.pack([number], hyper.estimate_options_of([group]), [0], 1.0, 0.0)
    assert record.GROUP.unpack(packed[record.STEP.size :])[-2:] == (address, 32)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.skipif(bool(native.MISSING), reason="no compiled module")
@pytest.mark.parametrize(("dtype", "state"), [(torch.float32, "s"), (torch.float16, "delta")], ids=str)
def test_addresses_in_python_are_those_in_cpp(dtype, state):
    entries = slots(dtype)
    kinds = tensor_list.TensorList, native._C.TensorList
    lists = [kind(entries, torch.Tensor, "float32", 1) for kind in kinds]
    first, second, third = (entry.param.grad for entry in entries)
    mixed = [first.float() if state == "delta" else first, second, None]
    for grads in ([first, second, third], [None, second, None], mixed):
        assert [tensors.load_gradients(grads) for tensors in lists] == [-1, -1]
        assert lists[0].gradient_words() == lists[1].gradient_words() != b""
    freed = first.clone()
    freed.untyped_storage().resize_(0)
    sparse = first.to_sparse(), first.to_sparse_csr()
    for wrong in (first.double(), first.t().contiguous().t(), first[:2], *sparse, freed):
        assert [tensors.load_gradients([wrong, second, third]) for tensors in lists] == [0, 0]
    assert [tensors.unchanged() for tensors in lists] == [True, True]
    entries[1].state[state] = entries[1].state[state].clone()
    assert [tensors.unchanged() for tensors in lists] == [False, False]


@pytest.mark.skipif(device_of("triton") != "cpu", reason="the kernels are not run by the CPU here")
def test_it_needs_no_compiled_module(monkeypatch):
    monkeypatch.setattr(native, "MISSING", "no C++ compiler (test)")
    ours = train(start("triton", [50, 7], slice_p=3), steps=2)
    assert type(ours._runtime.plans.plans[0][0]._native) is tensor_list.TensorList
    agree(ours, train(start("reference", [50, 7], slice_p=3), steps=2))
