"""The kernels for GPUs, run by the CPU: what the common suite does not ask of every backend."""

import os
import subprocess
import sys
from pathlib import Path

import emulated
import interpreted
import kernel_runs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runs import OPTIONS, agree, at_offset, params, train, values
from oracle import same, snapshot
from toolbox import device_of
from torch import nn

from prodigy_fused import Prodigy
from prodigy_fused.backends import gpu, triton

CHUNK = interpreted.SIZES.chunk
# Of float32 and float64, every element sampled.
assert emulated.native is None or emulated.native.POLICIES[0][1] == CHUNK


@pytest.fixture(params=["emulated", "triton"])
def backend(request):
    if device_of(request.param) != "cpu":
        pytest.skip(f"the kernels of {request.param} are not run by the CPU here")
    return request.param


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request):
    return request.param


def start(backend, sizes=None, name=None, **options):
    """On the backend, or on that of another name with the same tensors."""
    more = [] if backend == "triton" else [CHUNK, CHUNK - 1, 2 * CHUNK + 1, 3 * CHUNK + 2]
    return kernel_runs.start(name or backend, sizes or [2 * CHUNK + 5, 1, 70, 0, *more], **options)


# -- the grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_grid_or_the_order_of_blocks(monkeypatch, backend, options, dtype):
    seen = []
    for grid in [(1, 0), (2, 2), (1000, 6)]:
        monkeypatch.setattr(emulated, "grid", grid)
        monkeypatch.setattr(triton, "PROGRAMS_PER_MULTIPROCESSOR", grid[0])
        seen.append(snapshot(train(start(backend, dtype=dtype, **options))))
    assert seen[0][2][0]["d"] > 1e-3
    assert all(same(seen[0], other) for other in seen)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_bits_do_not_depend_on_the_alignment(backend, options, offset):
    aligned, odd = start(backend, dtype=torch.float32, **options), start(backend, dtype=torch.float32, **options)
    for p in params(odd):
        p.data = torch.cat([torch.zeros(offset), p.data])[offset:]
    assert same(snapshot(train(aligned)), snapshot(train(odd)))


def test_more_groups_than_a_block_keeps(backend):
    sizes = [7, 40, CHUNK + 3] * (30 if backend == "emulated" else 2)
    agree(*(train(start(backend, sizes, name, each_its_group=True), steps=3) for name in (backend, "reference")))


@pytest.mark.parametrize("hard_to_undo", [{"weight_decay": 700.0}, {"beta3": 0.0}], ids=str)
def test_x_that_waits_for_finish_although_d_stays(backend, hard_to_undo):
    agree(*(train(start(backend, name=name, d_coef=1e-9, **hard_to_undo)) for name in (backend, "reference")))


# -- launches and uploads ----------------------------------------------------------------------------------------------


def test_two_launches_a_step(backend, monkeypatch, options):
    launches = []
    if backend == "triton":
        launch = triton.TritonPlan._launch
        monkeypatch.setattr(triton.TritonPlan, "_launch", lambda *a, **k: launches.append(1) or launch(*a, **k))
    opt = train(start(backend, **options), steps=2)
    before = emulated.native.launches() if backend == "emulated" else len(launches)
    train(opt, steps=3, first=4)
    assert (emulated.native.launches() if backend == "emulated" else len(launches)) - before == 6


def test_tables_are_uploaded_when_they_change(backend, monkeypatch):
    opt = train(start(backend, [50, 60]), steps=1)
    uploads, original = [], gpu.GpuPlan._upload
    monkeypatch.setattr(gpu.GpuPlan, "_upload", lambda *args: uploads.append(1) or original(*args))
    for _ in range(2):
        opt.step()  # with the same gradients
    assert len(uploads) == 0
    params(opt)[0].grad = torch.ones(50, dtype=torch.float64)
    opt.step()
    assert len(uploads) == 1
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert len(uploads) == 2


def test_an_upload_that_failed_is_made_up_for(backend, monkeypatch):
    whole, broken = (train(start(backend), steps=1) for _ in range(2))
    before = snapshot(broken)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", None)  # no pinned memory left, say
        with pytest.raises(TypeError):
            train(broken, steps=1, first=1)
    assert same(before, snapshot(broken))
    broken.step()
    assert same(snapshot(train(whole, steps=1, first=1)), snapshot(broken))


# -- numbers that only the device knows --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lr_in_a_tensor(backend, options, dtype, monkeypatch):
    plain = train(start(backend, **options))
    tensor = start(backend, lr=torch.ones((), dtype=dtype), **options)
    monkeypatch.setattr("prodigy_fused.options.on_device", lambda value: isinstance(value, torch.Tensor))
    train(tensor)
    assert same(snapshot(plain)[:2], snapshot(tensor)[:2])
    for lr in (0.25, 0.0, 0.5):
        tensor.param_groups[0]["lr"].fill_(lr)
        plain.param_groups[0]["lr"] = lr
        before = snapshot(tensor)
        train(plain, 1, first=9)
        train(tensor, 1, first=9)
        assert same(snapshot(plain)[:2], snapshot(tensor)[:2])
        assert same(before, snapshot(tensor)) == (lr == 0)


def test_an_lr_on_the_device_that_is_no_number_touches_nothing(backend, monkeypatch):
    monkeypatch.setattr("prodigy_fused.options.on_device", lambda value: isinstance(value, torch.Tensor))
    opt = train(start(backend, [50, 7], lr=torch.ones(())), 2)
    before = snapshot(opt)
    opt.param_groups[0]["lr"].fill_(torch.nan)
    opt.step()
    opt.param_groups[0]["lr"].fill_(1)
    assert same(before, snapshot(opt))


def test_numbers_on_the_device_are_named_when_they_are_none(backend, monkeypatch):
    monkeypatch.setattr("prodigy_fused.options.on_device", lambda value: isinstance(value, torch.Tensor))
    whole = torch.ones((), dtype=torch.int64)
    for name, lr, grad_scale in (("lr", whole, None), ("grad_scale", 1.0, whole)):
        opt = start(backend, [5], lr=lr)
        opt.grad_scale = grad_scale
        with pytest.raises(ValueError, match=f"^{name} must be a number or a float32 or float64 tensor"):
            train(opt, 1)


def test_grad_scale_and_found_inf_on_the_device(backend, options, monkeypatch):
    plain, scaled = start(backend, **options), start(backend, **options)
    train(plain, 1), train(scaled, 1)
    monkeypatch.setattr("prodigy_fused.options.on_device", lambda value: isinstance(value, torch.Tensor))
    scaled.grad_scale = torch.tensor(4.0)
    scaled.found_inf = torch.tensor(0.0)
    for k in range(1, 6):
        train(plain, 1, first=k)
        for p, q in zip(params(plain), params(scaled), strict=True):
            q.grad = p.grad * 4
        for skip in (1.0, 0.0):
            scaled.found_inf.fill_(skip)
            before = snapshot(scaled)
            scaled.step()
            assert same(before, snapshot(scaled)) == bool(skip)
    assert same(snapshot(plain), snapshot(scaled))


def test_a_step_shared_with_a_backend_that_waits_for_numbers(backend):
    pair = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": p, "backend": name} for p, name in zip(pair, (backend, "foreach"), strict=True)]
    opt = train(Prodigy(groups, d0=1e-3), steps=1)
    for _ in range(3):
        opt.step()
    assert opt.d > 1e-3
    assert all((p < 1).all() for p in pair)


def test_only_the_last_plan_of_a_step_advances_the_estimate(backend):
    both = []
    for name in (backend, "reference"):
        pair = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
        opt = Prodigy(pair, backend=name, d0=1e-3)
        for _ in range(4):
            for p in pair:
                p.grad = torch.ones_like(p)
            opt.step()
        both.append(opt)
    assert [len(opt._runtime.plans.plans) for opt in both] == [2, 2]
    assert both[0].step_count == 4 and both[0].corrections == both[1].corrections > 0
    agree(*both, tolerance=1e-6)


def test_samples_are_row_major_in_any_memory_order(backend):
    ours, theirs = (nn.Parameter(values([120], 0)[0].view(2, 3, 4, 5).permute(3, 0, 2, 1)) for _ in range(2))
    both = [Prodigy([p], backend=name, d0=1e-3, slice_p=3) for p, name in ((ours, backend), (theirs, "reference"))]
    agree(*map(train, both))


@pytest.mark.parametrize("options", [{"slice_p": 1 << 40}, {"betas": (0.0, 0.99)}], ids=str)
def test_what_only_some_chunks_have(backend, options):
    """A sample in the first chunk only; a gradient that is not finite, of which `finish` makes the step."""
    both = [train(kernel_runs.start(name, [CHUNK + 5, 7], **options), 2) for name in (backend, "reference")]
    for opt in both:
        params(opt)[0].grad[CHUNK + 1] = torch.nan
        opt.step()
        assert all(p.isfinite().all() for p in params(opt))
    agree(*both)


# -- lists of tensors --------------------------------------------------------------------------------------------------

size = st.sampled_from([0, 1, 3, 4, 5, 63, 64, 255, 256, 257, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2])
tensor = st.tuples(
    size | st.integers(0, 2 * CHUNK + 9),
    st.integers(0, 5),  # its offset in memory
    st.integers(0, 5),  # its gradient's
    st.lists(st.booleans(), min_size=3, max_size=3),  # in which steps it has one
    st.integers(0, 2),  # its group
)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    tensors=st.lists(tensor, min_size=1, max_size=12),
    slice_p=st.sampled_from([1, 1, 2, 3, 11, CHUNK - 1, CHUNK, CHUNK + 1, 1 << 40]),
    lrs=st.lists(st.sampled_from([1.0, 0.3, 0.0]), min_size=3, max_size=3),
    beta1=st.sampled_from([0.9, 0.0]),
)
def test_any_list_of_tensors(backend, tensors, slice_p, lrs, beta1):
    xs = values([size for size, *_ in tensors], 0)
    both = []
    for name in (backend, "reference"):
        groups = [{"params": [], "lr": lr} for lr in lrs]
        for (_, offset, _, _, group), x in zip(tensors, xs, strict=True):
            groups[group]["params"].append(nn.Parameter(at_offset(x, offset)))
        groups = [group for group in groups if group["params"]]
        both.append(Prodigy(groups, backend=name, d0=1e-3, slice_p=slice_p, betas=(beta1, 0.99), weight_decay=0.1))
    by_group = sorted(tensors, key=lambda t: t[4])
    for k in range(3):
        grads = values([size for size, *_ in by_group], 10 + k)
        for opt in both:
            for p, g, (_, _, offset, here, _) in zip(params(opt), grads, by_group, strict=True):
                p.grad = at_offset(g + 1, offset) if here[k] else None
            opt.step()
    agree(*both, tolerance=1e-10)


# -- sanitizers --------------------------------------------------------------------------------------------------------

OVERRUN = """
import emulated, torch
from prodigy_fused import Prodigy
emulated.register()
p = torch.nn.Parameter(torch.ones(emulated.native.POLICIES[0][1]))
p.grad = torch.ones_like(p)
opt = Prodigy([p], backend="emulated")
opt.step()
# The end of the last chunk, before its two shifts and the two ends of the range of chunks.
ends = opt._runtime.plans.plans[0][0]._buffers["table"][-40:-32].view(torch.int64)
assert ends.item() == p.numel()
ends += 4
opt.step()
"""


@pytest.mark.skipif(not getattr(emulated.native, "SANITIZED", False), reason="not built under AddressSanitizer")
def test_a_chunk_out_of_bounds_is_caught():
    here = Path(__file__).parent
    path = os.pathsep.join([str(here / "emulation"), *filter(None, [os.environ.get("PYTHONPATH"), str(here.parent)])])
    environment = {**os.environ, "PYTHONPATH": path, "PRODIGY_FUSED_EMULATION": str(emulated.BUILD)}
    result = subprocess.run([sys.executable, "-c", OVERRUN], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
