"""An estimate for each group, with the bits of one optimizer per group; a bound of d; an estimate with an end."""

import copy
import itertools

import pytest
import torch
from toolbox import D0, agree, feed, gradient, make, make_params, parameters, train, twins
from torch import nn

from prodigy_fused import Prodigy
from prodigy_fused.estimate import FIELDS

OPTIONS = {
    "default": {},
    "decay, bias correction": {"weight_decay": 0.1, "use_bias_correction": True},
    "no momentum": {"betas": (0.0, 0.99)},
    "sampled": {"slice_p": 3, "growth_rate": 1.5},
}
SHAPES = ((4, 3), (1100,), (7,), (), (2, 3, 2, 2), (2049,))  # some of several chunks of the emulation
OF_GROUPS = [{}, {"lr": 0.5, "d0": 1e-4}, {"d_coef": 2.0, "betas": (0.9, 0.9)}]


def start(backend, dtype=torch.float32):
    return make_params(dtype, backend.device, SHAPES)


def groups_of(params, own=OF_GROUPS):
    sizes = [2, 1, 3]
    ends = list(itertools.accumulate(sizes, initial=0))
    return [{"params": params[a:b], **o} for a, b, o in zip(ends, ends[1:], own, strict=False)]


def give(params, t, without=()):
    for i, p in enumerate(params):
        p.grad = None if i in without else gradient(p, i, t) * 3.0 ** (i - 2)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize(
    ("options", "dtype"), [*zip([*OPTIONS] * 2, DTYPES, strict=False)], ids=lambda value: str(value)
)
def test_split_groups_are_one_optimizer_per_group(backend, dtype, options):
    """Bit by bit, through missing gradients, a NaN, and an lr of 0."""
    options = OPTIONS[options]
    ours, theirs = start(backend, dtype), start(backend, dtype)
    split = backend(groups_of(ours), split_groups=True, d0=D0, **options)
    alone = [backend(**{"d0": D0, **options, **group}) for group in groups_of(theirs)]
    for t in range(8 if backend.crawls else 12):
        for params in (ours, theirs):
            give(params, t, without=(2,) if t == 3 else (0, 1) if t < 2 else ())
            if t == 5:
                params[3].grad.fill_(torch.nan)
        lr = 0.0 if t == 4 else 0.5
        split.param_groups[1]["lr"] = alone[1].param_groups[0]["lr"] = lr
        for opt in (split, *alone):
            opt.step()
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
    for group, opt in zip(split.param_groups, alone, strict=True):
        assert [float(group[name]) for name in ("d", "d_numerator", "d_denom", "k", "nonfinite_steps")] == [
            float(opt.param_groups[0][name]) for name in ("d", "d_numerator", "d_denom", "k", "nonfinite_steps")
        ]
    assert len({float(group["d"]) for group in split.param_groups}) == 3


def test_groups_that_change_places_keep_their_estimates(backend):
    ours, theirs = start(backend), start(backend)
    split = backend(groups_of(ours), split_groups=True, d0=D0)
    alone = [backend(**{"d0": D0, **group}) for group in groups_of(theirs)]
    for t in range(6):
        if t == 3:
            split.param_groups.insert(0, split.param_groups.pop())
            alone.insert(0, alone.pop())
        for params in (ours, theirs):
            give(params, t)
        for opt in (split, *alone):
            opt.step()
    assert all(map(torch.equal, ours, theirs))
    estimates = [[float(group[name]) for name in FIELDS] for group in split.param_groups]
    assert estimates == [[float(opt.param_groups[0][name]) for name in FIELDS] for opt in alone]


def test_a_checkpoint_of_split_groups_continues(backend):
    whole, first = start(backend), start(backend)
    opts = [backend(groups_of(params), split_groups=True, d0=D0) for params in (whole, first)]
    for t in range(4):
        for params, opt in zip((whole, first), opts, strict=True):
            give(params, t)
            opt.step()
    again = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = backend(groups_of(again), split_groups=True, d0=D0)
    resumed.load_state_dict(copy.deepcopy(opts[1].state_dict()))
    for t in range(4, 7):
        for params, opt in ((whole, opts[0]), (again, resumed)):
            give(params, t)
            opt.step()
    assert all(map(torch.equal, whole, again))
    assert [g["d"] for g in opts[0].param_groups] == [g["d"] for g in resumed.param_groups]


def test_a_group_that_comes_late_starts_at_its_own_d0(backend):
    params = start(backend)
    opt = backend([{"params": params[:2]}], split_groups=True, d0=D0)
    for t in range(3):
        give(params, t)
        opt.step()
    opt.add_param_group({"params": params[2:], "d0": 1e-5})
    assert opt.param_groups[1]["d"] == 1e-5
    give(params, 3)
    opt.step()
    assert [int(group["k"]) for group in opt.param_groups] == [4, 1]


def test_with_several_estimates_there_is_no_single_d():
    opt = make(None, [{"params": [p]} for p in make_params()], split_groups=True)
    for name in ("d", "step_count", "nonfinite_steps", "corrections", "d0"):
        with pytest.raises(RuntimeError, match=r"param_groups\[i\]"):
            getattr(opt, name)
    assert make(None, [{"params": make_params()}], split_groups=True).d == D0


def test_all_groups_are_split_or_none():
    params = make_params()
    with pytest.raises(ValueError, match="split_groups"):
        Prodigy([{"params": params[:1], "split_groups": True}, {"params": params[1:], "split_groups": False}])
    follows = Prodigy([{"params": params[:1], "split_groups": True}, {"params": params[1:]}])
    assert follows.param_groups[1]["split_groups"] is True


def test_report():
    one = make(None, d0=0.25)
    assert one.report() == {"d": 0.25, "d_hat": 0.25, "k": 0, "corrections": 0, "nonfinite_steps": 0, "d_lr": 0.25}
    shared = make(None, [{"params": [p], "lr": 0.5 * i} for i, p in enumerate(make_params())], d0=0.25)
    assert shared.report()["d"] == 0.25 and shared.report()["d_lr/3"] == 0.375
    split = make(None, [{"params": [p]} for p in make_params()], d0=0.25, split_groups=True)
    assert {"d/0", "d_lr/3", "nonfinite_steps/2"} <= set(split.report())
    assert all(type(value) is float for value in split.report().values())


# -- a bound, and an end ---------------------------------------------------------------------------------------------


def test_d_never_passes_its_limit(backend):
    limited, free = (make(backend, d_limit=limit) for limit in (2.5 * D0, float("inf")))
    for t in range(backend.steps(15)):
        for opt in (limited, free):
            feed(opt, t)
            opt.step()
        assert limited.d == min(free.d, 2.5 * D0) or limited.d == 2.5 * D0
    assert free.d > limited.d == 2.5 * D0
    assert limited.param_groups[0]["d_max"] > 2.5 * D0


def test_a_limit_below_the_first_estimate_is_refused():
    with pytest.raises(ValueError, match=r"d_limit.*at least d0"):
        make(None, d_limit=D0 / 2)


@pytest.mark.parametrize("options", [{}, {"slice_p": 3}, {"betas": (0.0, 0.99)}], ids=str)
def test_after_its_steps_d_stays_and_the_samples_are_given_back(backend, options):
    """The same x as that of a run whose d cannot grow from there on, without s and p0."""
    steps = 4
    ended, pinned = make(backend, prodigy_steps=steps, **options), make(backend, **options)
    train(ended, pinned, steps=steps)
    assert {"s", "p0"} <= set(ended.state[parameters(ended)[0]])
    d = ended.d
    for t in range(steps, steps + 4):
        for opt in (ended, pinned):
            feed(opt, t)
            pinned.param_groups[0].update(d=d, d_max=d, growth_rate=1.0, d_coef=1e-300)
            opt.step()
    assert ended.d == d > D0 and ended.step_count == steps + 4
    for p, q in zip(parameters(ended), parameters(pinned), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)
        assert not {"s", "p0"} & set(ended.state[p])


@pytest.mark.parametrize("mode", ["stochastic", "displacement", "nearest"])
def test_an_ended_estimate_in_16_bits(backend, mode):
    opt = backend(start(backend, torch.bfloat16), prodigy_steps=3, low_precision=mode, d0=D0)
    params = parameters(opt)
    for t in range(6):
        give(params, t)
        opt.step()
    assert ("p0" in opt.state[params[0]]) == (mode == "displacement")
    assert "s" not in opt.state[params[0]]
    assert all(p.isfinite().all() for p in params)


def test_checkpoints_know_that_an_estimate_has_ended(backend):
    opts = [make(backend, prodigy_steps=3) for _ in range(2)]
    train(*opts, steps=5)
    again = make(backend, [nn.Parameter(p.detach().clone()) for p in parameters(opts[1])], prodigy_steps=3)
    again.load_state_dict(opts[1].state_dict())
    train(opts[0], again, steps=2, start=5)
    assert opts[0].d == again.d > D0 and opts[0].step_count == again.step_count == 7
    assert all(map(torch.equal, parameters(opts[0]), parameters(again)))
    assert "s" not in again.state[parameters(again)[0]]


def test_each_of_split_groups_ends_by_itself(backend):
    params = start(backend)
    own = [{"prodigy_steps": 2}, {"prodigy_steps": 4}, {}]
    opt = backend(groups_of(params, own), split_groups=True, d0=D0)
    frozen = []
    for t in range(6):
        give(params, t)
        opt.step()
        frozen.append([group["frozen"] for group in opt.param_groups])
    assert frozen[1] == [False, False, False] and frozen[2] == [True, False, False]
    assert frozen[4] == [True, True, False]
    assert [int(group["k"]) for group in opt.param_groups] == [6, 6, 6]


def test_the_new_options_leave_the_reference_as_it_is(backend):
    """Their defaults change nothing."""
    opts = twins(backend)
    train(*opts)
    agree(*opts)
