"""The CUDA kernels, run by the CPU: what the common suite does not ask of every backend."""

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import same, snapshot
from torch import nn

from prodigy_fused import Prodigy, hyper

pytestmark = pytest.mark.skipif(emulated.native is None, reason=str(emulated.MISSING))
CHUNK = emulated.native.CHUNK if emulated.native else 0
SIZES = [3 * CHUNK + 5, 1, 70, CHUNK, CHUNK - 1, 0, 2 * CHUNK + 1]
OPTIONS = {
    "default": {},
    "no momentum": {"betas": (0.0, 0.99), "use_bias_correction": True},
    "sampled": {"slice_p": 3, "weight_decay": 0.1},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request):
    return request.param


def values(sizes, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=draw, dtype=torch.float64).to(dtype) * 3.0 ** (i % 5) for i, n in enumerate(sizes)]


def start(name, sizes=SIZES, dtype=torch.float64, each_its_group=False, **options):
    params = [nn.Parameter(x) for x in values(sizes, 0, dtype)]
    groups = [{"params": p, "lr": 1 / (1 + i % 7)} for i, p in enumerate(params)] if each_its_group else params
    return Prodigy(groups, backend=name, d0=1e-3, **options)


def params(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def train(opt, steps=4, first=0):
    for k in range(first, first + steps):
        xs = params(opt)
        for p, g in zip(xs, values([p.numel() for p in xs], 1 + k, xs[0].dtype), strict=True):
            p.grad = 0.02 * g + 1  # a drift, so that d grows
        opt.step()
    return opt


def agree(a, b, tolerance=1e-12):
    assert a.d == pytest.approx(b.d, rel=tolerance)
    for p, q in zip(params(a), params(b), strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance)


# -- the grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_grid_or_the_order_of_blocks(monkeypatch, options, dtype):
    seen = []
    for grid in [(1, 0), (1, 1), (2, 2), (3, 3), (7, 4), (7, 5), (1000, 6)]:
        monkeypatch.setattr(emulated, "grid", grid)
        seen.append(snapshot(train(start("emulated", dtype=dtype, **options))))
    assert seen[0][2][0]["d"] > 1e-3
    assert all(same(seen[0], other) for other in seen)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_bits_do_not_depend_on_the_alignment(options, offset):
    aligned, odd = start("emulated", dtype=torch.float32, **options), start("emulated", dtype=torch.float32, **options)
    for p in params(odd):
        p.data = torch.cat([torch.zeros(offset), p.data])[offset:]
    assert same(snapshot(train(aligned)), snapshot(train(odd)))


def test_more_groups_than_a_block_keeps():
    sizes = [7, 40, CHUNK + 3] * 30
    agree(*(train(start(name, sizes, each_its_group=True), steps=3) for name in ("emulated", "reference")))


@pytest.mark.parametrize("hard_to_undo", [{"weight_decay": 700.0}, {"beta3": 0.0}], ids=str)
def test_x_that_waits_for_finish_although_d_stays(hard_to_undo):
    agree(*(train(start(name, d_coef=1e-9, **hard_to_undo)) for name in ("emulated", "reference")))


# -- launches and uploads ----------------------------------------------------------------------------------------------


def test_two_launches_a_step(options):
    opt = train(start("emulated", **options))
    before = emulated.native.launches()
    train(opt, steps=3, first=4)
    assert emulated.native.launches() - before == 6


def test_tables_are_uploaded_when_they_change(monkeypatch):
    uploads, original = [], emulated.EmulatedPlan._upload
    monkeypatch.setattr(emulated.EmulatedPlan, "_upload", lambda *args: uploads.append(1) or original(*args))
    opt = train(start("emulated", [50, 60]), steps=1)
    assert len(uploads) == 2  # the tensors; the groups and gradients
    for _ in range(3):
        opt.step()  # with the same gradients
    assert len(uploads) == 2
    params(opt)[0].grad = torch.ones(50, dtype=torch.float64)
    opt.step()
    assert len(uploads) == 3
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert len(uploads) == 4


def test_an_upload_that_failed_is_made_up_for(monkeypatch):
    whole, broken = (train(start("emulated"), steps=1) for _ in range(2))
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
def test_lr_in_a_tensor(options, dtype, monkeypatch):
    plain = train(start("emulated", **options))
    tensor = start("emulated", lr=torch.ones((), dtype=dtype), **options)
    monkeypatch.setattr(hyper, "on_device", lambda value: isinstance(value, torch.Tensor))
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


def test_grad_scale_and_found_inf_on_the_device(options, monkeypatch):
    plain, scaled = start("emulated", **options), start("emulated", **options)
    train(plain, 1), train(scaled, 1)
    monkeypatch.setattr(hyper, "on_device", lambda value: isinstance(value, torch.Tensor))
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


# -- lists of tensors --------------------------------------------------------------------------------------------------

around = st.sampled_from([0, 1, 3, 4, 5, 63, 64, 255, 256, 257, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2])
tensor = st.tuples(
    around | st.integers(0, 2 * CHUNK + 9),
    st.integers(0, 5),  # its offset in memory
    st.integers(0, 5),  # its gradient's
    st.lists(st.booleans(), min_size=3, max_size=3),  # in which steps it has one
    st.integers(0, 2),  # its group
)


def at_offset(t, offset):
    return torch.cat([t.new_full((offset,), 7.25), t, t.new_full((3,), 7.25)])[offset : offset + t.numel()]


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(
    tensors=st.lists(tensor, min_size=1, max_size=12),
    slice_p=st.sampled_from([1, 1, 2, 3, 11, CHUNK - 1, CHUNK, CHUNK + 1, 1 << 40]),
    lrs=st.lists(st.sampled_from([1.0, 0.3, 0.0]), min_size=3, max_size=3),
    beta1=st.sampled_from([0.9, 0.0]),
)
def test_any_list_of_tensors(tensors, slice_p, lrs, beta1):
    xs = values([size for size, *_ in tensors], 0)
    both = []
    for name in ("emulated", "reference"):
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
p = torch.nn.Parameter(torch.ones(emulated.native.CHUNK))
p.grad = torch.ones_like(p)
opt = Prodigy([p], backend="emulated")
opt.step()
ends = opt._plans.plans[0][0]._buffers["table"][-8:].view(torch.int64)
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
