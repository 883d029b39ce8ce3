"""Tests that need a GPU: no synchronisation, the launches of a step, CUDA graphs, AMP. `bench/gpu_check` runs them."""

from functools import partial

import pytest
import torch
from conftest import BACKENDS, REQUIRED, missing
from torch import nn

from prodigy_fused import Prodigy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
OPTIONS = {
    "default": {},
    "no momentum": {"betas": (0.0, 0.99)},
    "sampled, bias correction": {"slice_p": 11, "use_bias_correction": True, "weight_decay": 0.1},
    "lr in a tensor": {"lr": "tensor"},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request):
    tensor = request.param.get("lr") == "tensor"
    return {**request.param, "lr": torch.ones((), device="cuda")} if tensor else request.param


@pytest.fixture(params=["cuda", "triton"])
def start(request):
    reason = missing(next(backend for backend in BACKENDS if backend.name == request.param))
    if reason is not None:
        (pytest.fail if request.param in REQUIRED else pytest.skip)(reason)
    return partial(started, request.param)


def started(backend, sizes=(70_001, 3, 4096), **options):
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=draw).cuda()) for n in sizes]
    return params, Prodigy(params, backend=backend, d0=1e-3, **options)


def give_gradients(params, k):
    draw = torch.Generator(device="cuda").manual_seed(k)
    for p in params:
        p.grad = 1 + torch.randn(p.shape, generator=draw, device="cuda")


@pytest.fixture
def no_synchronisation():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", [False, True])
def test_the_host_never_waits(start, options, amp, no_synchronisation):
    params, opt = start(**options)
    give_gradients(params, 0)
    opt.step()
    no_synchronisation()
    for k in range(1, 8):
        give_gradients(params, k)
        if amp:
            opt.grad_scale = torch.full((), 8.0, device="cuda")
            opt.found_inf = torch.zeros((), device="cuda")
        opt.step()
    torch.cuda.set_sync_debug_mode("default")
    assert opt.d > 1e-3


def test_launches(start, options):
    params, opt = start(sizes=[1000] * 100, **options)
    give_gradients(params, 0)
    opt.step()
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in events if "Optimizer" not in e.name]
    assert len(names) == 2, names
    assert all("prodigy" in name for name in names)


def test_a_step_takes_no_memory(start, options):
    params, opt = start(sizes=[1 << 20] * 4, **options)
    give_gradients(params, 0)
    opt.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_cuda_graph(start, tensor_lr):
    def lr():
        return torch.ones((), device="cuda") if tensor_lr else 1.0

    (eager, plain), (captured, opt) = start(lr=lr(), capturable=True), start(lr=lr(), capturable=True)
    for params, o in ((eager, plain), (captured, opt)):
        give_gradients(params, 0)
        o.step()
    give_gradients(captured, 1)
    static = [p.grad for p in captured]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for k in range(1, 12):
        give_gradients(eager, k)
        for g, p in zip(static, eager, strict=True):
            g.copy_(p.grad)
        if tensor_lr:
            for o in (plain, opt):
                o.param_groups[0]["lr"].fill_(1 / k)
        graph.replay()
        plain.step()
        if k % 4 == 0:  # a step outside of the graph, with gradients elsewhere, does not disturb it
            for params, o in ((eager, plain), (captured, opt)):
                give_gradients(params, 100 + k)
                o.step()
        assert all(map(torch.equal, captured, eager))
    assert opt.d == plain.d > 1e-3


def test_graphed_callables(start):
    """A model whose forward and backward passes are graphs leaves its gradients in the same memory in every step."""
    (eager, plain), (params, opt) = start(sizes=(1000,)), start(sizes=(1000,), capturable=True)

    class Model(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = p

        def forward(self, x):
            return (self.p * x).sum()

    draw = torch.Generator(device="cuda").manual_seed(0)
    graphed = torch.cuda.make_graphed_callables(Model(params[0]), (torch.randn(1000, device="cuda"),))
    for _ in range(5):
        x = 1 + torch.randn(1000, generator=draw, device="cuda")  # the gradient: a drift, so that d grows
        for model, o in ((Model(eager[0]), plain), (graphed, opt)):
            o.zero_grad()
            model(x).backward()
            o.step()
        assert torch.equal(eager[0], params[0])
    assert opt.d == plain.d > 1e-3


def test_grad_scaler(start):
    params, opt = start(fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    twins, plain = start()
    for k in range(8):
        give_gradients(twins, k)
        plain.step()
        for overflow in [True, False] if k == 3 else [False]:
            before = [p.detach().clone() for p in params]
            opt.zero_grad()
            factor = float("inf") if overflow else 1.0
            loss = sum((p * q.grad * factor).sum() for p, q in zip(params, twins, strict=True))
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            assert all(map(torch.equal, before, params)) == overflow
    assert opt.step_count == 8
    assert opt.d == pytest.approx(plain.d, rel=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_devices(start):
    params, one = start()
    more = [nn.Parameter(p.detach().to("cuda:1")) for p in params]
    both = Prodigy([*params, *more], backend=one.defaults["backend"], d0=1e-3)
    for k in range(5):
        give_gradients(params, k)
        for p, q in zip(params, more, strict=True):
            q.grad = p.grad.to("cuda:1")
        both.step()
        assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(params, more, strict=True))
    assert both.d > 1e-3


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": False}], ids=str)
def test_cpu_and_gpu_together(options):
    """The estimate is with the first plan; every other gets it, and the last one sends it back."""
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, generator=draw) for n in (300, 5)]
    mixed, alone = ([nn.Parameter(x.clone().to(device)) for x, device in zip(xs, devices, strict=True)]
                    for devices in (("cpu", "cuda"), ("cpu", "cpu")))  # fmt: skip
    groups = [[{"params": [p], **({} if p.is_cuda else options)} for p in params] for params in (mixed, alone)]
    both, cpu = (Prodigy(g, d0=1e-3) for g in groups)
    for k in range(6):
        draw.manual_seed(k)
        for p, q in zip(mixed, alone, strict=True):
            q.grad = 1 + torch.randn(q.shape, generator=draw)
            p.grad = q.grad.to(p.device)
        both.step()
        cpu.step()
        assert both.d == pytest.approx(cpu.d, rel=1e-6)
        assert all(torch.allclose(p.cpu(), q, rtol=1e-5) for p, q in zip(mixed, alone, strict=True))
    assert both.d > 1e-3
