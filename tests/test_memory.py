"""The memory that a step allocates, and that the state keeps."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

resource = pytest.importorskip("resource", reason="POSIX only")

MIB = 1 << 20
SIZE = 48 * MIB  # above what malloc takes from the middle of its heap


@contextlib.contextmanager
def at_most(size: int, device: str) -> Iterator[None]:
    """Fails where more memory than ``size`` bytes is allocated on top of what there is."""
    gc.collect()  # now, not meanwhile
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what glibc keeps at the end of its heap would hide an allocation from the limit
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        assert torch.cuda.max_memory_allocated() - before <= size
        return
    # The kernel refuses. (The peak of the resident size, the usual measure, also moves for reasons of its own.)
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def test_the_limit():
    with at_most(SIZE + 4 * MIB, "cpu"):
        torch.ones(SIZE // 4)
    with pytest.raises(RuntimeError, match="memory"), at_most(SIZE - 4 * MIB, "cpu"):
        torch.ones(SIZE // 4)


RUNS = {
    "default": {},
    "no momentum, coupled": {"betas": (0.0, 0.999), "weight_decay": 0.1, "decouple": False},
    "sampled": {"slice_p": 11, "weight_decay": 0.1},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_a_step_allocates_nothing_of_parameter_size(backend, options):
    if not backend.one_pass or backend.small:
        pytest.skip("makes no such promise")
    dtype, options = options.get("dtype", torch.float32), {k: v for k, v in options.items() if k != "dtype"}
    params = [nn.Parameter(torch.ones(n, dtype=dtype, device=backend.device)) for n in (SIZE // 4, 17)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = backend(params, **options)
    opt.step()
    for _ in range(4):
        corrections = opt.corrections
        with at_most(SIZE // 8, backend.device):
            opt.step()
    assert opt.corrections > corrections  # with a second pass


SHAPES = [(1000,), (30, 7), (), (0,), (4, 3, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("slice_p", [1, 2, 11])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("zero", [False, True])
def test_state(backend, dtype, slice_p, beta1, zero):
    make = torch.zeros if zero else torch.ones
    params = [nn.Parameter(make(shape, dtype=dtype, device=backend.device)) for shape in SHAPES]
    opt = backend(params, slice_p=slice_p, betas=(beta1, 0.999))
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    for p in params:
        samples = -(-p.numel() // slice_p)
        elements = {"s": samples, "p0": 1 if zero or p.numel() == 0 else samples, "exp_avg_sq": p.numel()}
        if beta1 > 0:
            elements["exp_avg"] = p.numel()
        state = {key: t for key, t in opt.state[p].items() if key != "step"}
        assert opt.state[p]["step"] == 3
        assert {key: t.untyped_storage().nbytes() // p.element_size() for key, t in state.items()} == elements
        assert {t.dtype for t in state.values()} == {dtype}
        if zero:
            assert state["p0"].dim() == 0
