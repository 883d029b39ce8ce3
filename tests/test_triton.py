"""The Triton backend besides what the common suite and ``test_emulation.py`` ask: compilation, choice, tables."""

import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_runs import agree, at_offset, params, start, train, values
from oracle import same, snapshot
from processes import python
from toolbox import device_of, wants_grad_dtype

from prodigy_fused import Prodigy, backends, hyper, options, record
from prodigy_fused.backends import native, tensor_list, triton, triton_tables

needs_triton = pytest.mark.skipif(device_of("triton") is None, reason="no Triton here")


# -- kernels and launches ----------------------------------------------------------------------------------------------

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
steps([1], {"maximize": True})
steps([16] * 16, {"decouple": False, "use_bias_correction": True, "betas": (0.0, 0.9), "beta3": 0.5})
print(len(launches), len(compiled))
steps([1], {"slice_p": 3})
for mode in ("stochastic", "24bit", "displacement", "nearest"):
    steps([3, 40, 17], {"low_precision": mode}, torch.bfloat16)
print(len(launches), len(compiled))
"""


@needs_triton
def test_nothing_that_changes_between_steps_compiles_anew():
    """Sampling, types, and what is kept beside x do, in one pair of kernels each."""
    assert python(COUNT).split() == ["42", "2", "112", "10"]


@needs_triton
def test_a_compiled_kernel_is_launched_with_as_many_programs_as_fit(monkeypatch):
    """On NVIDIA's GPUs; elsewhere through Triton, without the option that only its compiler for these knows."""
    launched = []

    class Kernel:
        n_regs, metadata = 81, SimpleNamespace(num_warps=4)

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((self, grid, len(arguments), options)) or Compiled()

    class Compiled(Kernel):
        pass

    plan = start("triton", [50_000])
    train(plan, 1)
    plan = plan._runtime.plans.plans[0][0]
    step = SimpleNamespace(rows=plan.sums)
    monkeypatch.setattr(triton, "_multiprocessors", lambda device: 2)
    for nvidia in (True, False):
        monkeypatch.setattr(triton, "_is_nvidia", lambda device, nvidia=nvidia: nvidia)
        kernel = Kernel()
        for _ in range(3):
            plan._launch(kernel, step, plan.sums)
    kinds = [type(kernel) for kernel, *_ in launched]
    assert kinds == [Kernel, Compiled, Compiled, Kernel, Kernel, Kernel]
    assert launched[1][1] == (2 * 5, 1, 1)  # 65536 // (128 threads * 88 registers)
    assert len({count for _, _, count, _ in launched}) == 1
    assert [sorted(options) for *_, options in launched[::2]] == [
        ["enable_fp_fusion", "maxnreg", "num_warps"], [], ["enable_fp_fusion", "num_warps"]
    ]  # fmt: skip


@pytest.mark.skipif(device_of("triton") != "cpu", reason="the kernels are not run by the CPU here")
@pytest.mark.parametrize("slice_p", [1, 3])
@wants_grad_dtype
def test_gradients_of_either_type_give_the_same_bits(slice_p):
    """All of them of 16 bits, all of 32, or some of each: three kernels."""
    seen = []
    for wide in ([], [0, 1, 2], [1]):
        opt = start("triton", [70, 1030, 5], torch.bfloat16, slice_p=slice_p)
        for p in (ps := params(opt)):
            p.grad_dtype = None
        for k in range(2):
            for i, (p, g) in enumerate(zip(ps, values([70, 1030, 5], k, torch.bfloat16), strict=True)):
                p.grad = g.float() if i in wide else g
            opt.step()
        seen.append(snapshot(opt))
    assert same(seen[0], seen[1]) and same(seen[0], seen[2])


@needs_triton
def test_only_whole_aligned_eights_are_taken_in_16_bytes():
    from prodigy_fused.triton_kernels.tables import TENSOR_FIELDS, Gradient, Tensor
    from triton import language as tl

    from prodigy_fused.triton_kernels import elements

    tensor = Tensor(**{**dict.fromkeys(TENSOR_FIELDS, 1 << 10), "numel": 1 << 4})
    aligned = getattr(elements.is_aligned, "fn", elements.is_aligned)
    arrays = {"x", "m", "v", "numel"}
    kinds = (
        (tl.float32, elements.SOME, elements.AS_IT_IS, set()),
        (tl.float32, elements.ALL, elements.AS_IT_IS, {"s", "x0"}),
        (tl.float32, elements.NONE, elements.DISPLACED, {"x0", "delta"}),
        (tl.float32, elements.NONE, elements.EXTENDED, {"low"}),
        (tl.uint8, elements.ALL, elements.AS_IT_IS, {"s", "x0", "delta"}),
    )
    for *kind, more in kinds:
        assert aligned(tensor, Gradient(1 << 10, 32), *kind)
        assert not aligned(tensor, Gradient(1 << 3, 32), *kind)
        for field in {"x", "m", "v", "s", "x0", "delta", "low", "numel"}:
            moved = tensor._replace(**{field: (1 << 10) + 4})
            assert aligned(moved, Gradient(1 << 10, 32), *kind) == (field not in arrays | more)


def laid_out(t):
    """The same elements as tensors of several layouts: tails, other memory orders, misaligned."""
    order = {"memory_format": torch.channels_last}
    transposed = torch.cat([t[:1320], t.new_full((512,), 7.25)])[:1320].view(40, 33).t()  # before other memory
    tensors = [t[:1029], t[:360].view(3, 8, 3, 5).to(**order), t[:8].view(2, 4), t[0]]
    return [*map(torch.clone, tensors), transposed, at_offset(t[:1032], 1), at_offset(t, 2)]


@pytest.mark.skipif(device_of("triton") != "cpu", reason="the kernels are not run by the CPU here")
@pytest.mark.parametrize(
    "slice_p", [11, *(pytest.param(p, marks=pytest.mark.slow) for p in (1, 2, 3, 4, 5, 61, 1025, 1 << 40))]
)
def test_samples_of_tensors_of_any_layout(slice_p):
    both = []
    for name in ("triton", "reference"):
        opt = Prodigy(map(torch.nn.Parameter, laid_out(values([2048], 0)[0])), backend=name, d0=1e-3, slice_p=slice_p)
        for k in range(2):
            for p, g in zip(params(opt), laid_out(values([2048], 1 + k)[0] + 1), strict=True):
                p.grad = g
            opt.step()
        both.append(opt)
    agree(*both)
    for p, q in zip(*map(params, both), strict=True):
        assert torch.allclose(both[0].state[p]["s"], both[1].state[q]["s"], rtol=1e-12, atol=0)


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
        (lambda m: m.setattr("triton.__version__", "3.1.0"), ["3.1.0 is too old", "3.6", "torch 2.10"]),
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
    words, *_ = triton_tables.rows_of(entries, 1 << 13)
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
        words = lists[0].gradient_words()
        assert words == lists[1].gradient_words() != b""
        assert all(tensors.gradient_words(words) is words for tensors in lists)
    assert [tensors.load_gradients([first, second.double(), None]) for tensors in lists] == [1, 1]
    assert [tensors.load_gradients([None, second, None], 1) for tensors in lists] == [-1, -1]  # keeps the first
    for tensors in lists:
        went_on = tensors.gradient_words()
        tensors.load_gradients([first, second, None])
        assert went_on == tensors.gradient_words()
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
