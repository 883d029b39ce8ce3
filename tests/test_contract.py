"""The promises of torch.optim about any optimizer, and other tools that work on one between its steps."""

import copy
import warnings

import prodigyopt
import pytest
import torch
from toolbox import (
    D0,
    NHWC,
    agree,
    each_compiled,
    feed,
    make,
    parameters,
    snapshot,
    train,
    twins,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def quadratic(opt):
    """A closure: the loss is ``|x - 1|^2 / 2`` over all parameters."""

    def closure():
        opt.zero_grad()
        loss = sum(((p - 1) ** 2).sum() / 2 for p in parameters(opt))
        loss.backward()
        return loss

    return closure


# -- step ----------------------------------------------------------------------------------------------------


def test_closure(backend):
    ours, theirs = twins(backend)
    for _ in range(6):
        with torch.no_grad():  # the closure must get its gradients all the same
            loss = ours.step(quadratic(ours))
        assert loss.item() == pytest.approx(theirs.step(quadratic(theirs)).item(), rel=1e-12)
    agree(ours, theirs)


def test_step_returns_none_without_a_closure_and_leaves_the_grad_mode_alone():
    opt = make()
    feed(opt, 0)
    assert opt.step() is None
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad_fn is None for p in parameters(opt))


def test_step_hooks():
    opt, calls = make(), []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o.param_groups[0]["k"]))),
        opt.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o.param_groups[0]["k"]))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("global", o.param_groups[0]["k"]))),
    ]
    try:
        train(opt, steps=2)
    finally:
        for handle in handles:
            handle.remove()
    train(opt, steps=1)
    assert calls == [("pre", 0), ("post", 1), ("global", 1), ("pre", 1), ("post", 2), ("global", 2)]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.11
def test_profiler_sees_the_step():
    opt = make()
    feed(opt, 0)
    with torch.profiler.profile() as profile:
        opt.step()
        opt.zero_grad()
    assert {"Optimizer.step#Prodigy.step", "Optimizer.zero_grad#Prodigy.zero_grad"} <= {
        event.key for event in profile.key_averages()
    }


def test_nothing_is_printed_and_nothing_warned_about(backend, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make(backend, weight_decay=0.1, use_bias_correction=True))
    assert capfd.readouterr() == ("", "")


def test_repr_shows_the_settings_and_the_estimate():
    text = repr(make(d_coef=0.5))
    assert text.startswith("Prodigy (")
    assert "d_coef: 0.5" in text
    assert "d: 0.001" in text
    assert make().d0 == 0.001


def test_gradients_are_never_written(backend):
    opt = make(backend, weight_decay=0.1, decouple=False, maximize=True)
    for t in range(4):
        feed(opt, t)
        before = [p.grad.clone() for p in parameters(opt)]
        opt.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters(opt), before, strict=True))


@pytest.mark.parametrize("parameters_too", [False, True])
def test_steps_in_inference_mode_count_like_others(backend, parameters_too):
    """What is created in it cannot be changed outside: with torch's optimizers state, too."""
    with torch.inference_mode(parameters_too):
        opt = make(backend)
    _, theirs = twins(backend)
    for t in range(8):
        feed(opt, t)
        with torch.inference_mode(t % 2 == 0):
            opt.step()
            if t == 4:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(theirs)
    agree(opt, theirs)
    assert not any(t.is_inference() for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor))


# -- gradients that are not there ----------------------------------------------------------------------------


def without(t):
    """Parameter 2 first has a gradient in step 4; 0 and 3 miss some; step 5 has none at all."""
    missing = {0} if t % 3 == 1 else {NHWC} if t % 3 == 2 else set()
    return tuple(range(4)) if t == 5 else tuple(missing | ({2} if t < 4 else set()))


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_missing_and_late_gradients(backend, beta1):
    opts = twins(backend, betas=(beta1, 0.99), weight_decay=0.05)
    for t in range(10):
        for opt in opts:
            feed(opt, t, without=without(t))
            opt.step()
    agree(*opts)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(backend, set_to_none):
    opts = twins(backend)
    train(*opts)
    for opt in opts:
        opt.zero_grad(set_to_none=set_to_none)
        opt.step()
        opt.zero_grad(set_to_none=set_to_none)
    train(*opts, start=8)
    agree(*opts)


def test_frozen_parameters(backend):
    opt = make(backend, weight_decay=0.1)
    p = parameters(opt)[0].requires_grad_(False)
    frozen_at = p.clone()
    for _ in range(3):
        opt.step(quadratic(opt))
    assert torch.equal(p, frozen_at)
    assert p not in opt.state
    p.requires_grad_(True)
    opt.step(quadratic(opt))
    assert not torch.equal(p, frozen_at)
    assert torch.equal(opt.state[p]["p0"], frozen_at)


def test_clipped_gradients(backend):
    opts = twins(backend)
    for t in range(8):
        for opt in opts:
            feed(opt, t)
            nn.utils.clip_grad_norm_(parameters(opt), 0.5)
            opt.step()
    agree(*opts)


# -- mixed precision -----------------------------------------------------------------------------------------


def scaled_step(opt, scaler, t, unscale, factor=1.0):
    """One step in the usual AMP order, with the gradients ``feed`` would give, times ``factor``."""
    feed(opt, t)
    grads = [p.grad * factor for p in parameters(opt)]
    opt.zero_grad()
    loss = sum((p * g).sum() for p, g in zip(parameters(opt), grads, strict=True))
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(parameters(opt), 1e6)
    scaler.step(opt)
    scaler.update()


def train_with_an_overflow(opt, unscale):
    scaler = torch.amp.GradScaler(parameters(opt)[0].device.type, init_scale=1024.0)
    for t in range(8):
        if t == 3:
            before = [p.detach().clone() for p in parameters(opt)], opt.state_dict()["param_groups"]
            scaled_step(opt, scaler, t, unscale, float("inf"))
            assert scaler.get_scale() == 512.0
            assert all(map(torch.equal, before[0], parameters(opt)))
            assert before[1] == opt.state_dict()["param_groups"]
        scaled_step(opt, scaler, t, unscale)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_unscales_and_skips(backend, unscale):
    opt, plain = make(backend), make(backend)
    train_with_an_overflow(opt, unscale)
    train(plain)
    agree(opt, plain)


@each_compiled
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_leaves_it_to_a_fused_step(backend, unscale):
    opt, plain = make(backend, fused=True), make(backend)
    assert opt._step_supports_amp_scaling
    train_with_an_overflow(opt, unscale)
    train(plain)
    agree(opt, plain)


def test_grad_scale_and_found_inf_set_by_hand(backend):
    opt, plain = make(backend), make(backend)
    device = parameters(opt)[0].device
    opt.grad_scale = torch.tensor(8.0, device=device)
    for t in range(8):
        for found_inf in (1.0, 0.0):
            feed(opt, t)
            for p in parameters(opt):
                p.grad *= torch.inf if found_inf else 8.0
            opt.found_inf = torch.tensor(found_inf, device=device)
            before = snapshot(opt)
            opt.step()
            assert found_inf == 0.0 or snapshot(opt) == before
    train(plain)
    agree(opt, plain)
    assert not plain._step_supports_amp_scaling


# -- models --------------------------------------------------------------------------------------------------


X, Y = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()


def train_model(model, opt, steps=6):
    for _ in range(steps):
        opt.zero_grad()
        ((model(X) - Y) ** 2).mean().backward()
        opt.step()


def mlp(tied=False):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)]
    if tied:
        layers[2].weight = layers[0].weight
    return nn.Sequential(*layers).double()


def test_tied_parameters_are_stepped_once():
    models = mlp(tied=True), mlp(tied=True)
    ours = make(None, models[0].parameters())
    theirs = prodigyopt.Prodigy(models[1].parameters(), d0=D0)
    assert len(parameters(ours)) == 3
    for model, opt in zip(models, (ours, theirs), strict=True):
        train_model(model, opt)
    agree(ours, theirs)


@pytest.mark.parametrize("what", ["model", "training function"])
def test_compiled_training_is_eager_training(what):
    eager, compiled = mlp(), mlp()
    opts = make(None, eager.parameters()), make(None, compiled.parameters())
    train_model(eager, opts[0])
    if what == "model":
        train_model(torch.compile(compiled, backend="eager"), opts[1])
    else:
        torch.compile(train_model, backend="eager")(compiled, opts[1])
    agree(*opts)


def test_lazy_parameters_are_taken_up_when_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(3, dtype=torch.float64))
    opt = make(None, model.parameters())
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="parameter 0 has no shape yet"):
        saved["state"][0] = {"s": torch.zeros(1)}
        opt.load_state_dict(saved)
    train_model(model, opt)
    assert opt.param_groups[0]["k"] == 6


def test_averaged_model():
    model = mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    opt = make(None, model.parameters())
    expected = None
    for _ in range(4):
        train_model(model, opt, steps=2)
        average.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        expected = now if expected is None else [(e + p) / 2 for e, p in zip(expected, now, strict=True)]
    for e, p in zip(expected, average.module.parameters(), strict=True):
        assert torch.allclose(e, p, rtol=1e-12, atol=0)
