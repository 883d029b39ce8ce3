"""What a step looks at anew: groups that others have changed, and plans on several devices."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from toolbox import agree, each_compiled, feed, make, make_params, parameters, refused, train
from torch import nn

from prodigy_fused import step as steps
from prodigy_fused.step import Step


def two_dtypes():
    return [*make_params(torch.float32), *make_params(torch.float64)]


def test_the_last_plan_may_be_on_another_device(monkeypatch):
    """Its rows are then others than the optimizer's, to which they are copied back. (The first is elsewhere, too.)"""
    alone, moved = (make("reference", two_dtypes()) for _ in range(2))
    train(alone)

    def to(self, device):
        there = replace(self, rows=self.rows.clone(), new_rows=self.new_rows.clone())
        if hasattr(self, "sums"):
            there.sums = self.sums.clone()
        return there

    monkeypatch.setattr(Step, "to", to)
    train(moved)
    agree(moved, alone, rtol=0.0)


@pytest.mark.parametrize("changed", [lambda b: (*b, 0.5), lambda b: b[:1], lambda b: b[0]], ids=["3", "1", "number"])
def test_betas_of_another_length_are_noticed(backend, changed):
    """Although those that stay are the very same objects."""
    params = make_params(device=backend.device)
    opt = make(backend, [{"params": params[:2]}, {"params": params[2:]}])
    train(opt, steps=2)
    opt.param_groups[1]["betas"] = changed(opt.param_groups[1]["betas"])
    feed(opt, 2)
    with refused(opt, ValueError, "betas"):
        opt.step()


@pytest.mark.parametrize(
    ("own", "words"), [({"d_coef": 2.0}, ["0 and 1", "d_coef"]), ({"eps": -1.0}, ["eps"])], ids=["conflict", "bad"]
)
def test_a_group_that_others_append_is_checked(backend, own, words):
    """As accelerate does, without add_param_group."""
    opt = make(backend)
    train(opt, steps=2)
    extra = nn.Parameter(torch.ones(5, dtype=torch.float64, device=backend.device))
    opt.param_groups.append({**opt.param_groups[0], "params": [extra], **own})
    feed(opt, 2)
    with refused(opt, ValueError, *words):
        opt.step()
    opt.param_groups[1].update({name: opt.param_groups[0][name] for name in own})
    opt.step()
    assert not torch.equal(extra, torch.ones_like(extra))
    removed = opt.param_groups.pop()["params"]
    before = removed[0].detach().clone()
    train(opt, steps=1, start=3)
    assert torch.equal(removed[0], before) and len(parameters(opt)) == 4


@each_compiled
def test_numbers_are_packed_anew_only_where_one_may_have_changed(backend, monkeypatch):
    """The record of each step is what packing all of its numbers gives."""
    packed, original = [], steps.pack
    monkeypatch.setattr(steps, "pack", lambda *numbers: packed.append(original(*numbers)) or packed[-1])
    opt = make(backend, lr=0.5)
    group = opt.param_groups[0]

    def records(count, change=lambda: None):
        for t in range(2):
            change()
            feed(opt, t)
            opt.step()
            last = opt._runtime._last
            assert last.record == original(last.hypers, last.options, last.owners, last.grad_scale, last.found_inf)
        assert len(packed) == count
        packed.clear()

    records(1)
    records(0)
    records(1, lambda: group.update(lr=0.25))
    records(1, lambda: group.update(eps=1e-6))
    records(2, lambda: setattr(opt, "grad_scale", torch.tensor(2.0)))
    opt.grad_scale = None
    records(2, lambda: group.update(lr=torch.tensor(0.125, dtype=torch.float64)))
    group["lr"].mul_(0.5)  # in place
    records(2)
    group["lr"] = 1.0
    records(1)
    scaled = replace(opt._runtime._last, grad_scale=torch.tensor(2.0))
    again = replace(scaled)
    again.take_record_of(scaled)
    scaled.grad_scale.data = torch.tensor(2.0)  # at another address
    assert again.record == replace(scaled).record


def test_gradients_are_let_go_of_after_a_step(backend):
    """Also after one that has raised."""
    opt = make(backend)
    train(opt, steps=2)
    bucket = opt._runtime.plans.plans[0]
    assert bucket.grads == [None] * len(bucket.slots)
    feed(opt, 2)
    parameters(opt)[1].grad = parameters(opt)[1].grad.to_sparse()
    with refused(opt, RuntimeError, "sparse"):
        opt.step()
    seen = [weakref.ref(p.grad) for p in parameters(opt)]
    opt.zero_grad()
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
