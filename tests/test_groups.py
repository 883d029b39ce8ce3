"""Parameter groups: what they share, what each has for itself, how one joins, the numbers they publish."""

import copy
import json
import math

import pytest
import torch
from toolbox import (
    D0,
    TIGHT,
    agree,
    device_of,
    feed,
    gradient,
    make,
    make_params,
    parameters,
    refused,
    train,
    twins,
)
from torch import nn

from prodigy_fused import Prodigy

PUBLISHED = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k", "nonfinite_steps", "corrections")


def one(seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=generator).to(device))


def two_groups(backend, first, second, **common):
    params = [one(seed, device_of(backend)) for seed in (1, 2)]
    groups = [{"params": [p], **options} for p, options in zip(params, (first, second), strict=True)]
    return make(backend, groups, **common)


# -- what groups must share ----------------------------------------------------------------------------------

CONFLICTS = [
    ({"d0": 1e-4}, {}, "d0", "0.001 and 0.0001"),
    ({"d_coef": 2.0}, {}, "d_coef", "1.0 and 2.0"),
    ({"growth_rate": 1.02}, {}, "growth_rate", "inf and 1.02"),
    ({"beta3": 0.9}, {}, "beta3", "and 0.9"),
    ({"betas": (0.9, 0.99)}, {}, "beta3", "give beta3 explicitly"),
    ({"beta3": None}, {"beta3": 0.9}, "beta3", "0.9 and"),
]


@pytest.mark.parametrize(("different", "common", "name", "values"), CONFLICTS)
def test_conflicts_name_the_argument_and_both_groups(different, common, name, values):
    groups = [{"params": [one(1)]}, {"params": [one(2)]}, {"params": [one(3)], **different}]
    with pytest.raises(ValueError, match=rf"groups 0 and 2 disagree on {name}\b.*{values}") as caught:
        Prodigy(groups, **{"d0": D0, **common})
    assert name == "beta3" or "beta3" not in str(caught.value)

    opt = make(None, groups[:2], **common)
    train(opt, steps=2)
    with refused(opt, ValueError, "0 and 2", name, values):
        opt.add_param_group(groups[2])
    opt.param_groups[1].update(different)
    feed(opt, 2)
    with refused(opt, ValueError, "0 and 1", name, values):
        opt.step()


def test_a_checkpoint_whose_groups_conflict():
    """prodigyopt takes such groups, and mixes their numbers."""
    opt = two_groups(None, {}, {})
    train(opt, steps=2)
    saved = opt.state_dict()
    saved["param_groups"][1]["d_coef"] = 2.0
    with refused(opt, ValueError, "0 and 1", "d_coef", "1.0 and 2.0"):
        opt.load_state_dict(saved)


def test_betas_may_differ_with_a_common_beta3():
    opt = make(None, [{"params": [one(1)]}, {"params": [one(2)], "betas": (0.8, 0.99)}], beta3=0.99)
    train(opt)
    assert opt.d > D0


# -- what each group has for itself --------------------------------------------------------------------------


class Textbook:
    """docs/algorithm.md, Algorithm 4, with every option per group, in plain float64: an oracle of its own, since
    prodigyopt takes lr, betas, decouple and use_bias_correction from its first group."""

    def __init__(self, groups):
        self.groups, self.d, self.num, self.k = groups, D0, 0.0, 0
        self.beta3 = math.sqrt(0.999)
        for group in groups:
            group["x"] = group["params"][0].detach().clone()
            group["m"], group["v"] = torch.zeros_like(group["x"]), torch.zeros_like(group["x"])
            group["s"] = torch.zeros_like(group["x"].flatten()[:: group["slice_p"]])
            group["x0"] = group["x"].clone()

    def dlr(self, h):
        (beta1, beta2), k = h["betas"], self.k + 1
        bc = math.sqrt(1 - beta2**k) / (1 - beta1**k) if h["use_bias_correction"] else 1.0
        return self.d * h["lr"] * bc

    def step(self, grads):
        num, den, d = self.beta3 * self.num, 0.0, self.d
        for h, g in zip(self.groups, grads, strict=True):
            dlr, (beta1, beta2), p = self.dlr(h), h["betas"], h["slice_p"]
            g = -g if h["maximize"] else g
            h["g"] = g = g if h["decouple"] else g + h["weight_decay"] * h["x"]
            if h["lr"] == 0:
                continue
            num += d / D0 * dlr * (g * (h["x0"] - h["x"])).flatten()[::p].sum().item()
            h["m"] = beta1 * h["m"] + (1 - beta1) * d * g
            h["v"] = beta2 * h["v"] + (1 - beta2) * (d * g) ** 2
            h["s"] = self.beta3 * h["s"] + d / D0 * (d if h["safeguard_warmup"] else dlr) * g.flatten()[::p]
            den += h["s"].abs().sum().item()
        new = max(d, num / den) if d == D0 else d
        self.d_max = max(getattr(self, "d_max", D0), num / den)
        new = min(self.d_max, new * math.inf)
        for h in self.groups:
            dlr = self.dlr(h)
            decay = h["weight_decay"] * dlr if h["decouple"] else 0.0
            if h["lr"] > 0:
                h["x"] = h["x"] - decay * h["x"] - dlr * h["m"] / (h["v"].sqrt() + new * h["eps"])
        self.d, self.num, self.k = new, num, self.k + 1


PER_GROUP = {
    "lr": 0.25,
    "weight_decay": 0.3,
    "eps": 1e-2,
    "slice_p": 3,
    "use_bias_correction": True,
    "safeguard_warmup": True,
    "maximize": True,
    "betas": (0.5, 0.999),
}
VARIANTS = [{name: value} for name, value in PER_GROUP.items()]
VARIANTS += [{"weight_decay": 0.3, "decouple": False}, {"lr": 0.0, "weight_decay": 0.3}, PER_GROUP]
VARIANTS += [{**PER_GROUP, "decouple": False}]


@pytest.mark.parametrize("first", [{}, {"lr": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize("second", VARIANTS, ids=lambda options: "-".join(options))
def test_options_are_each_groups_own(backend, first, second):
    opt = two_groups(backend, first, second)
    defaults = {**opt.defaults, "d0": D0}
    book = Textbook([{**defaults, **g, "params": [one(i)]} for i, g in ((1, first), (2, second))])
    for t in range(12):
        feed(opt, t)
        book.step([gradient(h["x"], i, t) for i, h in enumerate(book.groups)])
        opt.step()
    assert opt.d == pytest.approx(book.d, rel=TIGHT)
    assert book.d > D0
    for p, h in zip(parameters(opt), book.groups, strict=True):
        assert torch.allclose(p.cpu(), h["x"], rtol=0, atol=TIGHT * h["x"].abs().max().item())


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decouple": False}])
def test_maximize_is_minimizing_the_negative(backend, options):
    up, down = make(backend, maximize=True, **options), make(backend, **options)
    for t in range(8):
        feed(up, t)
        feed(down, t)
        for p in parameters(up):
            p.grad.neg_()
        up.step()
        down.step()
    agree(up, down, rtol=0.0)


def test_a_group_with_lr_zero_is_not_touched(backend):
    opt = two_groups(backend, {}, {"weight_decay": 0.5})
    train(opt, steps=3)
    opt.param_groups[1]["lr"] = 0.0
    still = parameters(opt)[1]
    tensors = [still, *filter(torch.is_tensor, opt.state[still].values())]
    before = [v.clone() for v in tensors]
    train(opt, steps=3, start=3)
    assert all(map(torch.equal, before, tensors))
    opt.param_groups[1]["lr"] = 1.0
    train(opt, steps=1, start=6)
    assert not torch.equal(before[0], still)


# -- joining -------------------------------------------------------------------------------------------------


def test_a_group_joins_the_running_estimate(backend):
    ours, theirs = twins(backend)
    train(ours, theirs, steps=4)
    joined_at = {name: ours.param_groups[0][name] for name in PUBLISHED}
    for opt in (ours, theirs):
        opt.add_param_group({"params": one(5, device_of(backend))})
    # The reference starts a late group at k = 0 and reads d from group 0; here all groups show the same.
    theirs.param_groups[1]["k"] = theirs.param_groups[0]["k"]
    assert all({name: g[name] for name in PUBLISHED} == joined_at for g in ours.param_groups)
    train(ours, theirs, steps=4, start=4)
    agree(ours, theirs)
    assert ours.param_groups[0]["k"] == 8


def test_a_group_that_is_put_back_brings_no_old_estimate(backend):
    ours, theirs = twins(backend)
    for opt in (ours, theirs):
        params = parameters(opt)
        opt.param_groups[0]["params"] = params[:2]
        opt.add_param_group({"params": params[2:]})
        train(opt, steps=4)
        taken = opt.param_groups.pop()
        train(opt, steps=4, start=4)
        opt.param_groups.append(taken)
        train(opt, steps=3, start=8)
    agree(ours, theirs)


@pytest.mark.parametrize("first", [False, True])
def test_a_group_that_is_put_back_after_the_end_of_the_estimate(first):
    """Nobody could estimate d any more: the others' samples were given back."""
    opt = make("reference", [{"params": p} for p in make_params()], prodigy_steps=3)
    train(opt, steps=2)
    taken = opt.param_groups.pop(0 if first else 1)
    train(opt, steps=3, start=2)
    opt.param_groups.insert(0 if first else 1, taken)
    train(opt, steps=1, start=5)
    assert all(group["frozen"] for group in opt.param_groups)
    assert not any("s" in own for own in opt.state.values())
    opt.load_state_dict(opt.state_dict())
    train(opt, steps=1, start=6)


def test_groups_make_no_difference_by_themselves(backend):
    params = make_params(device=device_of(backend))
    split, whole = make(backend, [{"params": params[:1]}, {"params": params[1:]}]), make(backend)
    train(split, whole)
    agree(split, whole, rtol=0.0)


def test_a_parameter_moved_to_another_group_takes_its_options(backend):
    """The flat list of parameters stays the same, which a cache of it would not notice."""
    opt = two_groups(backend, {}, {"lr": 0.0})
    opt.param_groups[0]["params"].append(one(3, device_of(backend)))
    train(opt, steps=3)
    moved = opt.param_groups[0]["params"].pop()
    opt.param_groups[1]["params"].insert(0, moved)
    before = moved.detach().clone()
    train(opt, steps=1, start=3)
    assert torch.equal(moved, before)


def test_named_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    named = make(None, list(model.named_parameters()))
    groups = make(None, [{"params": m.named_parameters(prefix=str(i))} for i, m in enumerate(model)])
    assert named.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert [g["param_names"] for g in groups.param_groups] == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    train(named)
    groups.load_state_dict(groups.state_dict())
    assert "param_names" in named.state_dict()["param_groups"][0]
    with refused(named, ValueError, "names"):
        named.add_param_group({"params": [one()]})
    named.add_param_group({"params": [("extra", one())]})


def test_an_empty_group_is_allowed_as_in_torch():
    for groups in ([{"params": []}], [{"params": []}, {"params": [one()]}]):
        opt = make(None, groups)
        train(opt, steps=2)
        opt.load_state_dict(opt.state_dict())


# -- the numbers ---------------------------------------------------------------------------------------------


def test_published_numbers(backend):
    opt = two_groups(backend, {}, {"lr": 0.5})
    for steps in (0, 5):
        train(opt, steps=steps)
        for group in opt.param_groups:
            numbers = {name: group[name] for name in PUBLISHED}
            assert {name: float(value) for name, value in numbers.items()} == {
                name: float(opt.param_groups[0][name]) for name in PUBLISHED
            }
            if steps and backend.views:
                assert {(type(value), value.dim()) for value in numbers.values()} == {(torch.Tensor, 0)}
            else:
                wanted = [float] * 5 + [int] * 3
                assert [type(value) for value in numbers.values()] == wanted
                assert json.loads(json.dumps(numbers)) == numbers
                assert isinstance(group["d"] * group["lr"], float)
    first = opt.param_groups[0]
    assert (opt.d, opt.step_count) == (first["d"], 5)
    assert first["d_hat"] <= first["d_max"]
    assert opt.d <= first["d_max"]


@pytest.mark.parametrize("written", [{0: 0.5}, {1: 0.5}, {0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.25}], ids=str)
def test_d_written_by_the_user_is_honoured(backend, written):
    """In any group; where two differ, the first counts, as in the reference."""
    opt = two_groups(backend, {}, {})
    train(opt, steps=3)
    for i, d in written.items():
        opt.param_groups[i].update(d=d, d_max=d, d_numerator=0.0)
    before = [p.detach().clone() for p in parameters(opt)]
    train(opt, steps=1, start=3)
    assert opt.d >= 0.5
    assert all(group["d"] == opt.d for group in opt.param_groups)
    moved = max((p - q).abs().max().item() for p, q in zip(parameters(opt), before, strict=True))
    assert moved > 0.1  # dlr is computed from the new number: 0.01 and less otherwise


def test_counters(backend):
    opt = make(backend)
    train(opt, steps=6)
    d = opt.d
    assert opt.nonfinite_steps == 0
    assert 0 < opt.corrections <= opt.step_count == 6
    feed(opt, 6)
    parameters(opt)[2].grad.fill_(torch.nan)
    opt.step()
    assert (opt.nonfinite_steps, opt.step_count, opt.d) == (1, 7, d)
    train(opt, steps=2, start=7)
    assert math.isfinite(opt.d)
    assert opt.nonfinite_steps == 1


def test_a_new_group_has_the_options_of_the_estimate_that_it_joins():
    opt = Prodigy([one()], d_coef=2.0, beta3=0.9, d_limit=3.0)
    again = Prodigy([one()])
    feed(opt, 0)
    opt.step()
    again.load_state_dict(opt.state_dict())
    again.param_groups[0]["growth_rate"] = 1.5
    copied = copy.deepcopy(again)
    for opt in (again, copied):
        opt.add_param_group({"params": [one(1)]})
        names = ("d_coef", "beta3", "d_limit", "growth_rate", "d0", "prodigy_steps")
        assert [opt.param_groups[1][name] for name in names] == [opt.param_groups[0][name] for name in names]
        with refused(opt, ValueError, "0 and 2 disagree on d_coef"):
            opt.add_param_group({"params": [one(2)], "d_coef": 1.0})
    split = Prodigy([one()], split_groups=True)
    split.param_groups[0]["d_coef"] = 2.0
    split.add_param_group({"params": [one(1)]})
    assert split.param_groups[1]["d_coef"] == 1.0
