"""What wrappers, trainers and schedulers do to an optimizer: each was once reported as a fault."""

import copy
import json
import math
import warnings

import pytest
import torch
from toolbox import D0, agree, feed, make, make_params, parameters, train, twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prodigy_fused import Prodigy
from prodigy_fused.nonfinite import WARN_AFTER_STEPS
from prodigy_fused.step import Step

# -- state that others keep --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_entries_of_a_wrapper_stay_and_are_saved(backend, when):
    opt, plain = make(backend), make(backend)
    train(plain, steps=1)
    if when == "after it":
        train(opt, steps=1)
    for p in parameters(opt):
        opt.state[p]["ema"] = p.detach().clone()
    opt.state["updates"] = 7
    if when == "before the first step":
        train(opt, steps=1)
    train(opt, plain, steps=3, start=1)
    assert all(map(torch.equal, parameters(opt), parameters(plain)))
    again = make(backend)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.state["updates"] == 7
    first = opt.state[parameters(opt)[0]]["ema"]
    assert torch.equal(again.state[parameters(again)[0]]["ema"], first)


def test_an_entry_that_was_only_looked_at_is_no_state(backend):
    opt = make(backend)
    feed(opt, 0, without=(2, 3))
    opt.step()
    for p in parameters(opt):
        opt.state[p].get("exp_avg")  # a defaultdict creates an entry
    saved = opt.state_dict()
    assert saved["state"][2] == saved["state"][3] == {}
    again = make(backend, [nn.Parameter(p.detach().clone()) for p in parameters(opt)])
    again.load_state_dict(saved)
    train(opt, again, steps=2, start=1)
    agree(opt, again, rtol=0.0)


@pytest.mark.parametrize("options", [{}, {"slice_p": 3}], ids=str)
def test_state_put_back_by_hand_in_the_form_of_a_checkpoint(backend, options):
    """As ZeroRedundancyOptimizer.load_state_dict does: flat s and p0."""
    opt = make(backend, **options)
    train(opt, steps=3)
    again = make(backend, [nn.Parameter(p.detach().clone()) for p in parameters(opt)], **options)
    saved = copy.deepcopy(opt.state_dict())
    for i, p in enumerate(parameters(again)):
        again.state[p] = saved["state"][i]
    for group, old in zip(again.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in old.items() if key != "params"})
    train(opt, again, steps=2, start=3)
    agree(opt, again, rtol=0.0)


def test_every_parameter_counts_its_steps(backend):
    opt = make(backend)
    for t in range(4):
        feed(opt, t, without=(1,) if t < 3 else ())
        opt.step()
    assert [opt.state[p]["step"] for p in parameters(opt)] == [4, 1, 4, 4]
    assert [opt.state_dict()["state"][i]["step"] for i in range(4)] == [4, 1, 4, 4]
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert opt.state[parameters(opt)[0]]["step"] == 4


# -- groups ------------------------------------------------------------------------------------------------------------


def test_a_group_is_the_callers_own_dictionary(backend):
    first, late = make_params(device=backend.device)[2:]
    groups = [{"params": [first]}, {"params": (p for p in [late]), "lr": 0.5}]
    opt = backend(groups[:1], d0=D0)
    opt.add_param_group(groups[1])
    assert all(group is own for group, own in zip(opt.param_groups, groups, strict=True))
    groups[1]["lr"] = 0.0
    before = late.detach().clone()
    feed(opt, 0)
    opt.step()
    assert torch.equal(late, before)


def test_the_wish_of_a_group_wins():
    params = make_params()
    opt = Prodigy([{"params": params[:1]}, {"params": params[1:], "foreach": True}], fused=None, d0=D0)
    assert (opt.param_groups[1]["foreach"], opt.param_groups[1]["fused"]) == (True, None)
    by_default = Prodigy([{"params": params[:1], "fused": False}], foreach=None)
    assert by_default.param_groups[0]["fused"] is False
    both = Prodigy([{"params": params, "backend": "reference"}], foreach=True)
    assert both.param_groups[0]["backend"] == "reference" and both.param_groups[0]["foreach"] is None
    with pytest.raises(ValueError, match="exclude each other"):
        Prodigy([{"params": params, "fused": True, "foreach": True}])


@pytest.mark.parametrize("total", [3, 7, 10, 100])
def test_linear_to_zero_is_zero(backend, total):
    opt = make(backend)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, end_factor=0.0, total_iters=total)
    for t in range(min(total, 10)):
        feed(opt, t)
        opt.step()
        schedule.step()
    opt.param_groups[0]["lr"] = -4.7e-17
    before = [p.detach().clone() for p in parameters(opt)]
    feed(opt, total)
    opt.step()
    assert all(map(torch.equal, before, parameters(opt)))
    for wrong in (-1e-6, math.nan):
        opt.param_groups[0]["lr"] = wrong
        with pytest.raises(ValueError, match="Invalid lr"):
            opt.step()


def test_a_published_estimate_that_was_kept_stays_what_it_was(backend):
    opt, kept, seen = make(backend), [], []
    for t in range(5):
        feed(opt, t)
        opt.step()
        kept.append(opt.param_groups[0]["d"])
        seen.append(float(kept[-1]))
    assert [float(d) for d in kept] == seen and len(set(seen)) > 1
    assert json.loads(json.dumps(opt.report()))["d"] == seen[-1]


# -- values that are not finite ----------------------------------------------------------------------------------------

WEIGHT_DECAY = [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decouple": False}]
FORMATS = [
    (torch.float64, {}),
    (torch.float32, {"slice_p": 2}),
    *((torch.bfloat16, {"low_precision": mode}) for mode in ("stochastic", "displacement", "nearest")),
]


@pytest.mark.parametrize("decay", WEIGHT_DECAY, ids=str)
@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)
def test_an_infinite_parameter_does_not_stop_d(backend, dtype, options, decay):
    """A mask of -inf, without a gradient there: d, and all else, as if it held a number."""
    masked, plain = (make_params(dtype, backend.device) for _ in range(2))
    masked[0].data[0, 0] = masked[0].data[2, 2] = -math.inf
    plain[0].data[0, 0] = plain[0].data[2, 2] = 0.0
    opts = [backend(params, d0=D0, **options, **decay) for params in (masked, plain)]
    for t in range(6):
        for opt in opts:
            feed(opt, t)
            parameters(opt)[0].grad[0, 0] = parameters(opt)[0].grad[2, 2] = 0.0
            opt.step()
    assert opts[0].d == opts[1].d > D0 and opts[0].nonfinite_steps == 0
    assert torch.isneginf(masked[0][0, 0]) and torch.isneginf(masked[0][2, 2])
    masked[0].data[0, 0] = masked[0].data[2, 2] = 0.0
    plain[0].data[0, 0] = plain[0].data[2, 2] = 0.0
    assert all(map(torch.equal, masked, plain))


def test_sums_that_are_not_finite_are_told_once(backend):
    params = make_params(torch.float32, backend.device)
    params[3].data[0, 0, 0, 0] = math.inf
    opt = backend(params, d0=D0)
    told = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for t in range(2 * WARN_AFTER_STEPS + 1):
            feed(opt, t)
            opt.step()
            assert opt.nonfinite_steps == t + 1
            told.append(len([w for w in said if "not finite" in str(w.message)]))
    assert told == [0] * (WARN_AFTER_STEPS - 1) + [1] * (WARN_AFTER_STEPS + 2)
    assert "the value of parameter 3 of shape (2, 3, 2, 2)" in str(said[-1].message)
    assert opt.d == D0


def test_an_infinite_parameter_without_a_gradient_is_not_to_blame(backend):
    params = make_params(torch.float32, backend.device)
    params[0].data[0, 0] = -math.inf
    opt = backend(params, d0=D0)
    with pytest.warns(UserWarning, match="the gradient of parameter 2 "):
        for t in range(WARN_AFTER_STEPS):
            feed(opt, t)
            parameters(opt)[0].grad[0, 0] = 0.0
            parameters(opt)[2].grad.fill_(math.nan)
            opt.step()
            assert opt.nonfinite_steps == t + 1


def test_a_gradient_that_is_not_sampled_is_not_to_blame(backend):
    first, second, *_ = parameters(opt := make(backend, slice_p=2))
    second.data[0] = math.inf
    with pytest.warns(UserWarning, match="the value of parameter 1 "):
        for t in range(WARN_AFTER_STEPS):
            feed(opt, t)
            first.grad[0, 1] = math.nan
            opt.step()
            assert opt.nonfinite_steps == t + 1


def test_one_finite_step_in_between_is_no_reason_to_warn(backend):
    opt = make(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(15):
            feed(opt, t)
            if t % 9:
                parameters(opt)[0].grad[0, 0] = math.nan
            opt.step()
    assert opt.nonfinite_steps == 13


# -- tensors without numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"fused": False}, {"foreach": True}], ids=str)
def test_a_step_without_numbers(choice):
    """Memory estimators run one under FakeTensorMode."""
    with FakeTensorMode():
        net = nn.Linear(8, 8)
        opt = Prodigy(net.parameters(), weight_decay=0.1, **choice)
        for _ in range(2):
            opt.zero_grad()
            net(torch.randn(4, 8)).sum().backward()
            opt.step()
        assert opt.state[net.weight]["exp_avg"].shape == (8, 8)
        with pytest.raises(RuntimeError, match="FakeTensorMode"):
            Prodigy(net.parameters(), foreach=False)


def test_a_model_that_is_materialised_later():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.device("meta"):
            net = nn.Linear(3, 2)
        opt = Prodigy(net.parameters(), d0=D0)
        net.to_empty(device="cpu")
        nn.init.ones_(net.weight)
        nn.init.ones_(net.bias)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    assert opt.step_count == 1 and torch.equal(opt.state[net.weight]["p0"], torch.ones(2, 3))


def test_a_model_that_was_materialised_elsewhere():
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    opt = Prodigy(net.parameters())
    net.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"parameter 0 .* on the meta device.*construct the optimizer afterwards"):
        opt.step()


def test_a_parameter_twice_in_a_group_takes_one_step(backend):
    ours, theirs = twins(backend)
    p, q = parameters(ours)[3], parameters(theirs)[3]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = backend([p, p], d0=D0)
    once = backend([nn.Parameter(q.detach().clone())], d0=D0)
    for t in range(3):
        feed(once, t)
        p.grad = parameters(once)[0].grad.clone()
        twice.step()
        once.step()
    assert torch.equal(p, parameters(once)[0]) and twice.d == once.d
    twice.load_state_dict(twice.state_dict())
    twice.step()
    once.step()
    assert torch.equal(p, parameters(once)[0])


def test_a_skipped_step_keeps_the_estimate_in_rows_of_its_own(backend, monkeypatch):
    """On a GPU each step writes to new memory, and there only the device knows of a skip."""
    opt = make(backend)
    train(opt, steps=3)
    plans = opt._runtime.plans
    if not plans.reads_device:
        pytest.skip("the host decides")
    feed(opt, 3)
    plans.load_gradients()
    rows = opt._runtime._estimates.rows
    settings = opt._runtime._settings
    step = Step(settings.hypers, settings.estimates, rows, torch.full_like(rows, math.nan), found_inf=1.0)
    before = [p.detach().clone() for p in parameters(opt)]
    step.sums = plans.update(step)
    plans.finish(step)
    assert torch.equal(step.new_rows, rows)
    assert all(map(torch.equal, before, parameters(opt)))
