"""What a step looks at anew: groups that others have changed, and plans on several devices."""

from dataclasses import replace

import pytest
import torch
from toolbox import agree, feed, make, make_params, parameters, refused, train
from torch import nn

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
