"""Torch's tools of a training loop, with every implementation: schedulers, averaging, scaling, clipping, autograd."""

import copy
import math

import pytest
import torch
from toolbox import agree, feed, frozen, make_params, parameters, train
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch_inputs import IMPLEMENTATIONS, each_case, each_implementation, kwargs_of, started

from prodigy_fused import Prodigy

# -- schedulers --------------------------------------------------------------------------------------------------

STEPS = 20
# As their documentation shows them, or with as few arguments as they allow; beyond their end, too.
SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.95**t),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.95),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [5, 12]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "PolynomialLR-squared": lambda opt: lr_scheduler.PolynomialLR(opt, 15, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1), lr_scheduler.CosineAnnealingLR(opt, 15)], [5]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 1.0, 4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1.0, total_steps=STEPS),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=2),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.05),
}


def test_every_scheduler_is_in_the_table():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= {name.partition("-")[0] for name in SCHEDULERS}


def run_schedule(schedule, opt, closure, steps=STEPS):
    scheduler, losses = schedule(opt), []
    for step in range(steps):
        losses.append(opt.step(closure).item())
        if step < steps - 1:
            scheduler.step(*([losses[-1]] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert all(map(math.isfinite, losses))
    return losses


@each_implementation
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_run(name, lr, impl):
    opt, closure = started("default", impl, steps=0)
    opt.param_groups[0]["lr"] = copy.deepcopy(lr)
    losses = run_schedule(SCHEDULERS[name], opt, closure)
    assert losses[-1] < losses[0]


@each_implementation
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_a_linear_schedule_may_end_at_zero(lr, impl):
    """For about half of all lengths it ends, by rounding, at some -1e-17, and stays there. Which moves nothing."""
    for length in range(5, 16):
        opt, closure = started("default", impl, steps=0)
        opt.param_groups[0]["lr"] = copy.deepcopy(lr)
        run_schedule(lambda opt, n=length: lr_scheduler.LinearLR(opt, end_factor=0.0, total_iters=n), opt, closure)
        assert abs(float(opt.param_groups[0]["lr"])) < 1e-15
        before = frozen(parameters(opt))
        opt.step(closure)
        assert frozen(parameters(opt)) == before


# -- averages of the weights -----------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_averaged_model(impl, average):
    """The average is that of the iterates, it does not disturb the run, and batch norm is updated for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    twin, x = copy.deepcopy(model), torch.randn(16, 3)
    opts = [Prodigy(m.parameters(), d0=1e-2, **IMPLEMENTATIONS[impl]) for m in (model, twin)]
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
    schedulers = [swa_utils.SWALR(opt, swa_lr=0.5, anneal_epochs=3) for opt in opts]
    iterates = []
    for _ in range(4):
        for m, opt, scheduler in zip((model, twin), opts, schedulers, strict=True):
            opt.zero_grad()
            (m(x) - x.sum(1, keepdim=True)).pow(2).mean().backward()
            opt.step()
            scheduler.step()
        averaged.update_parameters(model)
        iterates.append(model[0].weight.detach().clone())
    assert torch.equal(model[0].weight, twin[0].weight)
    weights = [0.25] * 4 if average is None else [0.125, 0.125, 0.25, 0.5]
    expected = sum(w * iterate for w, iterate in zip(weights, iterates, strict=True))
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)
    swa_utils.update_bn([x], averaged)
    torch.testing.assert_close(averaged.module[1].running_mean, averaged.module[0](x).mean(0).detach())
    opts[0].load_state_dict(opts[1].state_dict())


# -- scaled and clipped gradients --------------------------------------------------------------------------------------


def scaled_run(desc, impl, unscale, overflows=()):
    """Six steps under a GradScaler, of a loss that in some is infinite."""
    opt = Prodigy(make_params(), **kwargs_of(desc, impl))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for t in range(6):
        for factor in (math.inf, 1.0) if t in overflows else (1.0,):
            feed(opt, t)
            grads = [p.grad * factor for p in parameters(opt)]
            opt.zero_grad()
            before = frozen([opt.state_dict(), parameters(opt)])
            scaler.scale(sum((p * g).sum() for p, g in zip(parameters(opt), grads, strict=True))).backward()
            if unscale:
                scaler.unscale_(opt)
                assert nn.utils.clip_grad_norm_(parameters(opt), 1e6).isfinite() == (factor == 1.0)
            scaler.step(opt)
            scaler.update()
            assert (frozen([opt.state_dict(), parameters(opt)]) == before) == (factor != 1.0)
    return opt


@pytest.mark.parametrize("unscale", [False, True])
@each_case
def test_grad_scaler(desc, impl, unscale):
    """Scaling by a power of 2 changes nothing, and neither does a step with an infinite gradient."""
    plain = Prodigy(make_params(), **kwargs_of(desc, impl))
    train(plain, steps=6)
    agree(scaled_run(desc, impl, unscale, overflows=(0, 3)), plain)


@each_implementation
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipped_gradients(impl, clip, foreach):
    """Each implementation sees what the clipping wrote."""
    runs = [Prodigy(make_params(), d0=1e-2, **IMPLEMENTATIONS[name]) for name in (impl, "loop")]
    for t in range(4):
        for opt in runs:
            feed(opt, t)
            if clip == "norm":
                nn.utils.clip_grad_norm_(parameters(opt), 0.1, error_if_nonfinite=True, foreach=foreach)
            else:
                nn.utils.clip_grad_value_(parameters(opt), 0.1, foreach=foreach)
            assert max(p.grad.abs().max() for p in parameters(opt)) <= 0.1
            opt.step()
    agree(*runs)


# -- autograd --------------------------------------------------------------------------------------------------------


def test_a_graph_from_before_the_step_raises(backend):
    """Two losses of one graph, and a step between their backward passes: the second gradient would be wrong."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).to(backend.device)
    opt = backend(net.parameters(), d0=1e-2)
    out = net(torch.randn(8, 4, device=backend.device))
    out.pow(2).sum().backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.abs().sum().backward()


def test_a_step_counts_as_a_change_of_each_parameter_it_moves(backend):
    opt = backend(make_params(torch.float32, backend.device), d0=1e-2)
    for t in range(2):
        feed(opt, t, without=(1,))
        versions = [p._version for p in parameters(opt)]
        opt.step()
        assert [p._version > before for p, before in zip(parameters(opt), versions, strict=True)] == [
            True, False, True, True,
        ]  # fmt: skip


def test_gradients_that_have_a_graph(backend):
    """Of a gradient penalty: the step is no part of the graph."""
    params, twins = (make_params(torch.float32, backend.device, ((3, 2), (2,))) for _ in range(2))
    opt, plain = backend(params, d0=1e-2), backend(twins, d0=1e-2)
    for _ in range(3):
        loss = sum(p.pow(3).sum() for p in params)
        for p, q, g in zip(params, twins, torch.autograd.grad(loss, params, create_graph=True), strict=True):
            assert g.requires_grad
            p.grad, q.grad = g, g.detach()
        opt.step()
        plain.step()
        opt.zero_grad()
    assert all(map(torch.equal, params, twins))
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert not any(getattr(value, "requires_grad", False) for state in opt.state.values() for value in state.values())


@each_implementation
@pytest.mark.parametrize("loss", [3.5, torch.tensor(3.5), None, "any object"], ids=repr)
def test_a_closure_returns_what_it_likes(impl, loss):
    opt = Prodigy(make_params(), d0=1e-2, **IMPLEMENTATIONS[impl])

    def closure():
        assert torch.is_grad_enabled()
        feed(opt, 0)
        return loss

    with torch.no_grad():
        assert opt.step(closure) is loss
        assert opt.step(closure=closure) is loss
    assert opt.step_count == 2
