"""Trouble that other optimizers run into: default devices, freed memory, threads, cycles, settings changed in place."""

import contextlib
import gc
import inspect
import sys
import threading
import weakref

import pytest
import torch
from toolbox import agree, feed, make, parameters, refused, train
from torch import nn

from prodigy_fused import Prodigy, plans
from prodigy_fused.backends import native
from prodigy_fused.hyper import estimate_options_of, hyper_of
from prodigy_fused.step import Step


def stepped(backend, params, **options):
    opt = backend(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    return opt


def test_a_step_under_another_default_device(backend):
    params = [nn.Parameter(torch.ones(5, device=backend.device))]
    with torch.device("meta"):
        opt = stepped(backend, params)
        params[0].grad = torch.full_like(params[0], 2.0)
        opt.step()
    assert opt.step_count == 2
    assert (params[0] < 1).all()


def test_a_step_follows_a_plan_to_its_device():
    groups = Prodigy([torch.ones(2)]).param_groups
    number = hyper_of(groups[0])
    hypers = [number, number._replace(lr=torch.ones(()))]
    step = Step(
        hypers, estimate_options_of(groups) * 2, torch.zeros(1, 8), torch.zeros(1, 8), found_inf=torch.zeros(())
    )
    step.sums = torch.zeros(1, 2)
    there, here = step.to(torch.device("meta")), step.to(torch.device("cpu"))
    assert all(t.is_meta for t in (there.rows, there.new_rows, there.sums, there.found_inf, there.hypers[1].lr))
    assert there.grad_scale == 1.0 and there.hypers[0] == step.hypers[0]
    assert here.rows is step.rows and here.sums is step.sums and here.hypers[1].lr is step.hypers[1].lr
    step.hypers = step.hypers[:1]
    part = step.to(torch.device("meta"))  # no tensor of the groups is elsewhere, but others are
    assert part.rows.is_meta and part.sums.is_meta


@pytest.mark.parametrize("freed", ["parameter", "gradient"])
def test_freed_memory_is_named(backend, freed):
    params = [nn.Parameter(torch.ones(n, device=backend.device)) for n in (3, 4)]
    opt = stepped(backend, params)
    before = params[0].detach().clone()
    victim = params[1] if freed == "parameter" else params[1].grad
    victim.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(4,\) has no memory"):
        opt.step()
    assert torch.equal(params[0], before)


def test_a_cycle_through_the_optimizer_is_collected(backend):
    p = nn.Parameter(torch.ones(5, device=backend.device))
    p.opt = stepped(backend, [p])
    gone = weakref.ref(p)
    del p
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("outcome", ["taken", "skipped", "refused"])
def test_a_step_lets_go_of_its_gradients(backend, outcome):
    """Else memory would grow by all gradients, or by the copies of those in another memory order."""
    params = [nn.Parameter(torch.ones(shape, device=backend.device)) for shape in ((3, 4), (5,))]
    opt = stepped(backend, params)
    first = torch.ones(4, 3, device=backend.device).t()
    last = torch.ones(5, device=backend.device)
    params[0].grad, params[1].grad = first, last
    opt.found_inf = torch.tensor(float(outcome == "skipped"), device=backend.device)
    if outcome == "refused":
        last.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory") if outcome == "refused" else contextlib.nullcontext():
        opt.step()
    gone = [weakref.ref(first), weakref.ref(last)]
    del first, last
    opt.zero_grad()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_skipped_first_step_creates_no_state(backend):
    params = [nn.Parameter(torch.ones(3, device=backend.device))]
    opt = backend(params)
    params[0].grad = torch.full_like(params[0], torch.inf)
    opt.found_inf = 1.0
    opt.step()
    assert not opt.state and opt.step_count == 0


def test_two_threads_cannot_step_at_once(backend):
    p = nn.Parameter(torch.ones(1 << 12, device=backend.device))
    opt = stepped(backend, [p], d_limit=1.0)  # or d overflows: the gradient never changes
    refused = []

    def train():
        for _ in range(50):
            try:
                opt.step()
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opt.step_count == 151 - len(refused)
    assert all("another thread" in text for text in refused)


def test_a_setting_changed_in_place_is_noticed(backend):
    p = nn.Parameter(torch.ones(3, device=backend.device))
    opt = stepped(backend, [p], betas=[0.9, 0.999], eps=torch.tensor(1e-8))
    opt.param_groups[0]["betas"][1] = float("nan")
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        opt.step()
    opt.param_groups[0]["betas"][1] = 0.999
    opt.param_groups[0]["eps"] = torch.tensor(-1.0)
    with pytest.raises(ValueError, match="eps"):
        opt.step()


@pytest.mark.parametrize("split", [False, True])
def test_a_step_that_fails_ends_no_estimate(backend, split):
    opt, other = make(backend, prodigy_steps=2, split_groups=split), make(backend)
    train(opt, other, steps=2)
    feed(opt, 2)
    p = parameters(opt)[1]
    p.grad = p.grad.to_sparse()
    with refused(opt, RuntimeError, "parameter 1 of shape (7,) is sparse"):
        opt.step()
    opt.param_groups[0]["prodigy_steps"] = 0
    train(opt, other, start=2)
    agree(opt, other, rtol=0.0)


def test_a_step_that_fails_once_samples_were_given_back(backend, monkeypatch):
    """As where memory for a plan is lacking: the estimate has ended, and the next step goes on."""
    opt = make(backend, prodigy_steps=2)
    train(opt, steps=2)
    feed(opt, 2)
    with monkeypatch.context() as patched:
        patched.setattr(plans.PlanSet, "_add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.step()
    opt.param_groups[0]["prodigy_steps"] = 0
    train(opt, steps=1, start=2)
    assert opt.step_count == 3 and opt.param_groups[0]["frozen"]
    assert not any("s" in opt.state[p] for p in parameters(opt))


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight_decay", -1.0, "weight_decay"),
        ("d_limit", 1e-9, "d_limit"),  # less than d0, which has not changed
        ("low_precision", "displacement", "slice_p"),
        ("d_coef", 2.0, "disagree on d_coef"),
        ("betas", (0.9, 0.99), "disagree on beta3"),
    ],
)
def test_a_change_of_one_option_is_checked_beside_all_that_stay(backend, at, name, value, words):
    opt = make(backend, [{"params": [nn.Parameter(torch.ones(3, device=backend.device))]} for _ in range(3)], slice_p=2)
    train(opt, steps=1)
    feed(opt, 1)
    group = opt.param_groups[at]
    before, group[name] = group[name], value
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            opt.step()
    group[name] = before
    group["eps"] = torch.tensor(1e-7)
    opt.step()
    assert opt.step_count == 2 and type(group["eps"]) is float


@pytest.mark.parametrize("options", [{"betas": (0.9, 0.0), "eps": 1e-16}, {"d0": 0.5, "weight_decay": 2.0}])
def test_a_step_that_is_none_leaves_x_alone(backend, options):
    """A late parameter, alone in its step, and without a non-zero gradient yet."""
    early, late = (nn.Parameter(torch.randn(33, device=backend.device)) for _ in range(2))
    opt = backend([early, late], growth_rate=1.0, **options)
    early.grad = torch.randn_like(early)
    opt.step()
    before = late.detach().clone()
    early.grad, late.grad = None, torch.zeros_like(late)
    opt.step()
    assert torch.equal(late, before)
    assert opt.step_count == 1


def test_the_estimate_may_be_given_in_the_first_group():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = Prodigy([{"params": [p], "d": 1e-3}, {"params": [q]}])
    assert [group["d"] for group in opt.param_groups] == [1e-3, 1e-3]


def test_what_others_keep_in_the_state_survives_a_checkpoint(backend):
    p = nn.Parameter(torch.ones(3, device=backend.device))
    opt = stepped(backend, [p])
    opt.state[p]["note"] = "mine"
    other = backend([p])
    other.load_state_dict(opt.state_dict())
    assert other.state[p]["note"] == "mine"


def test_a_capture_takes_no_step_that_has_something_to_set_up(backend, monkeypatch):
    """A graph records and does not compute: state created in a capture would hold no number."""
    opt = make(backend)
    feed(opt, 0)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "capturing", lambda params: True)
        with refused(opt, RuntimeError, "take one before the capture"):
            opt.step()
    opt.step()
    assert opt.step_count == 1


@pytest.mark.parametrize("capturable", [False, True])
def test_a_capture_is_for_those_who_asked_for_it(backend, monkeypatch, capturable):
    opt = make(backend, capturable=capturable)
    feed(opt, 0)
    opt.step()
    monkeypatch.setattr(plans, "capturing", lambda tensors: True)
    if capturable:
        opt.step()
    else:
        with refused(opt, RuntimeError, "capturable=True"):
            opt.step()
    assert opt.step_count == 1 + capturable


def interrupted(act, at):
    """Runs ``act()`` with a Ctrl-C after call number ``at`` of the package; returns whether there were so many."""
    calls = 0

    def interrupt(frame, event, _):
        nonlocal calls
        code = frame.f_code  # (what is raised while a generator is closed goes nowhere)
        if (
            event in ("call", "c_return")
            and "prodigy_fused" in code.co_filename
            and not code.co_flags & inspect.CO_GENERATOR
        ):
            calls += 1
            if calls == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # torch's own no_grad may not have come to its end
    return False


@pytest.mark.parametrize("options", [{}, {"prodigy_steps": 2}], ids=str)
@pytest.mark.parametrize("name", ["cpu", "foreach"])
def test_an_interrupt_at_any_call_leaves_nothing_half_done(name, options):
    goes_on, at = True, 1
    while goes_on:
        opt = make(name, [{"params": nn.Parameter(torch.ones(n))} for n in (2, 3, 4)], **options)
        for t in range(2):
            feed(opt, t, without=(2,))
            opt.step()
        parameters(opt)[0].data = torch.ones(2)
        feed(opt, 2)
        goes_on = interrupted(opt.step, at)
        feed(opt, 3)
        before = [p.detach().clone() for p in parameters(opt)]
        opt.step()
        assert not any(map(torch.equal, before, parameters(opt))), f"after call {at}"
        at += 7


def test_an_interrupted_load_leaves_an_optimizer_that_can_step():
    goes_on, at = True, 1
    while goes_on:
        opt = make("cpu", [nn.Parameter(torch.ones(n)) for n in (2, 3)])
        train(opt, steps=2)
        saved = opt.state_dict()
        goes_on = interrupted(lambda opt=opt, saved=saved: opt.load_state_dict(saved), at)
        train(opt, steps=1, start=2)
        opt.load_state_dict(saved)
        at += 5


def test_a_clone_that_shares_memory_until_it_is_written_stays_as_it_is(backend):
    opt = stepped(backend, [nn.Parameter(torch.ones(5, device=backend.device))])
    (p,) = parameters(opt)
    for _ in range(6):
        with torch.no_grad():
            lazy, clone = torch._lazy_clone(p), p.clone()
        feed(opt, 1)
        opt.step()
        assert torch.equal(lazy, clone) and not torch.equal(p, clone)


@pytest.mark.skipif(native.MISSING is not None, reason="_C is not built here")
def test_a_gradient_of_which_no_copy_can_be_read_either_ends_the_step(monkeypatch):
    """It could only be if torch keeps something in another way than this module has found when it was imported."""
    monkeypatch.setattr(native.NativePlan, "_laid_out", lambda plan, at, grad: grad)
    opt = Prodigy([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 2))], backend="cpu")
    for p in parameters(opt):
        p.grad = torch.ones_like(p)
    parameters(opt)[1].grad = torch.ones(2, 3).t()
    with pytest.raises(RuntimeError, match=r"a copy of the gradient of parameter 1 .* cannot be read"):
        opt.step()
    assert (parameters(opt)[0] == 1).all()
