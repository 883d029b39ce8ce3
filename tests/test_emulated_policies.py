"""Every kernel of the CUDA backend, one for each way that tensors are stored and sampled: run by the CPU."""

from __future__ import annotations

import emulated
import pytest
import torch
from kernel_runs import at_offset, params, values
from oracle import same, snapshot
from toolbox import wants_grad_dtype
from torch import nn

from prodigy_fused import Prodigy
from prodigy_fused.rounding import kept_value

pytestmark = pytest.mark.skipif(emulated.native is None, reason=str(emulated.MISSING))

NARROW = {"state_dtype": "bfloat16"}
SAMPLED = {"slice_p": 11}
FROZEN = {"prodigy_steps": 2}
DISPLACED = {"low_precision": "displacement"}
EXTENDED = {"low_precision": "24bit"}
STOCHASTIC = {"low_precision": "stochastic"}
EIGHT = {"state_dtype": "8bit", "min_8bit_size": 1}
# As UpdatePolicies of csrc/cuda/policy.h has them: the type of the parameters, and options with which it is chosen.
POLICIES = [
    (torch.float32, {}),
    (torch.float32, SAMPLED),
    (torch.float32, FROZEN),
    (torch.float64, SAMPLED),
    (torch.bfloat16, STOCHASTIC),
    (torch.bfloat16, STOCHASTIC | SAMPLED),
    (torch.bfloat16, STOCHASTIC | FROZEN),
    (torch.bfloat16, STOCHASTIC | NARROW),
    (torch.bfloat16, STOCHASTIC | SAMPLED | NARROW),
    (torch.bfloat16, STOCHASTIC | FROZEN | NARROW),
    (torch.bfloat16, DISPLACED),
    (torch.bfloat16, EXTENDED),
    (torch.bfloat16, EXTENDED | SAMPLED),
    (torch.bfloat16, EXTENDED | NARROW),
    (torch.bfloat16, EXTENDED | SAMPLED | NARROW),
    (torch.float16, STOCHASTIC),
    (torch.float16, SAMPLED),
    (torch.float16, {}),
    (torch.float32, NARROW),
    (torch.float32, SAMPLED | NARROW),
    (torch.float32, EIGHT),
    (torch.float32, EIGHT | SAMPLED),
    (torch.bfloat16, EIGHT | STOCHASTIC),
    (torch.bfloat16, EIGHT | STOCHASTIC | SAMPLED),
    (torch.bfloat16, EIGHT | EXTENDED),
    (torch.bfloat16, EIGHT | EXTENDED | SAMPLED),
    (torch.float16, EIGHT),
    (torch.float16, STOCHASTIC | NARROW),
]
ANY = len(POLICIES) - 1
ANY_CODED = ANY - 1
# Others that run in the last one, and in the one for float64.
MORE = [
    (ANY, torch.float16, SAMPLED | NARROW),
    (ANY, torch.float16, FROZEN),
    (ANY, torch.float32, FROZEN | NARROW),
    (ANY, torch.bfloat16, DISPLACED | NARROW),
    (ANY, torch.bfloat16, EXTENDED | FROZEN),
    (ANY_CODED, torch.float32, EIGHT | FROZEN),
    (ANY_CODED, torch.float16, EIGHT | SAMPLED),
    (3, torch.float64, {}),
    (3, torch.float64, FROZEN),
]
CASES = [(n, *case) for n, case in enumerate(POLICIES)] + MORE
ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def channels_last(x):
    """As a tensor of four dimensions, if it has any that fit."""
    n = x.numel() // 6
    return x[: 6 * n].view(2, n, 3, 1).to(memory_format=torch.channels_last)


def start(backend: str, policy: int, dtype, options) -> Prodigy:
    """Tensors that end around the ends of packs, tiles and chunks; some misaligned, one channels_last."""
    threads, chunk, tile = emulated.native.POLICIES[policy]
    sizes = [2 * chunk + 5, tile + 3, tile - 1, chunk, 8 * threads + 8, 9, 8, 7, 1, 0, chunk + 7]
    if options.get("state_dtype") == "8bit":
        sizes.remove(0)  # it has no codes, and so is in another plan
    xs = [x.clamp(-4, 4) for x in values(sizes, 0)]
    xs = [at_offset(x.to(dtype), 1) if i in (1, 4) else x.to(dtype) for i, x in enumerate(xs)]
    xs[-1] = channels_last(xs[-1])
    return Prodigy([nn.Parameter(x) for x in xs], backend=backend, d0=1e-3, weight_decay=0.01, **options)


def train(opt: Prodigy, steps: int = 4) -> Prodigy:
    for k in range(steps):
        xs = params(opt)
        for i, (p, g) in enumerate(zip(xs, values([p.numel() for p in xs], 1 + k), strict=True)):
            g = 0.02 * g.to(p.dtype).view(p.shape) + 1 + p.detach() / 4  # a drift, so that d grows
            g = g.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else g
            p.grad = at_offset(g, 3) if i in (0, 2) else g
        opt.step()
    return opt


def fields(opt: Prodigy):
    """The tensors that a step writes, by name and parameter."""
    for i, p in enumerate(params(opt)):
        yield f"x of {i}", p.detach()
        for key, value in opt.state[p].items():
            if key == "low":
                yield f"what is kept of {i}", kept_value(p.detach(), value)
            elif isinstance(value, torch.Tensor) and value.dim() and key != "p0":
                yield f"{key} of {i}", value


def check(ours: Prodigy, theirs: Prodigy) -> None:
    """Equal to rounding. What has 16 bits or 8 is rounded with the same bits: the same numbers, but for a few."""
    coded = ours.param_groups[0]["state_dtype"] == "8bit"
    exact = 2e-5 if coded else 1e-6  # a code that differs shows in the sums, too
    assert ours.d == pytest.approx(theirs.d, rel=exact) and ours.d > 1e-3
    ours_, theirs_ = dict(fields(ours)), dict(fields(theirs))
    assert ours_.keys() == theirs_.keys()
    changed = total = 0
    for name, a in ours_.items():
        b = theirs_[name]
        kept = name.startswith("what is kept")  # rounded with the same bits, too, but to 24 bits
        coarse = 2 * (2.0**-15 if kept else ROUNDED.get(a.dtype, 2 * exact))
        near = torch.isclose(a.double(), b.double(), rtol=coarse, atol=coarse / 32)
        if coded:  # as the codes are that it was made of
            assert a.dtype == b.dtype and (~near).sum() <= 2e-3 * a.numel() + 1, name
            continue
        assert near.all(), name
        assert not kept or (a != b).sum() <= 0.15 * a.numel() + 1, name
        if a.dtype in ROUNDED:
            changed += (a != b).sum().item()
            total += a.numel()
    assert changed <= 2e-3 * total


def name(case) -> str:
    policy, dtype, options = case
    return f"{policy}-{str(dtype)[6:]}-" + "-".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_policy(monkeypatch, case):
    seen = []
    for grid in ((1, 0), (3, 3), (1000, 5)):
        monkeypatch.setattr(emulated, "grid", grid)
        seen.append(train(start("emulated", *case)))
        assert emulated.native.policy() == case[0]
    assert all(same(snapshot(seen[0]), snapshot(other)) for other in seen[1:])
    check(seen[0], train(start("cpu", *case)))


def test_the_tables_are_tried_entirely():
    assert len(POLICIES) == len(emulated.native.POLICIES)


@pytest.mark.parametrize("slice_p", [2, 3, 4, 5, 61, 1500, 1 << 40])
@pytest.mark.parametrize(("policy", "dtype"), [(1, torch.float32), (5, torch.bfloat16)], ids=str)
def test_samples(policy, dtype, slice_p):
    """Also where there are none in most chunks, or in all but the first."""
    both = [train(start(name, policy, dtype, STOCHASTIC | {"slice_p": slice_p})) for name in ("emulated", "cpu")]
    assert emulated.native.policy() == policy
    check(*both)


@pytest.mark.parametrize("policy", [4, 5, 8, 10, 12, 20, 23])
def test_no_momentum(policy):
    """The gradient is read again by ``finish``."""
    dtype, options = POLICIES[policy]
    both = [train(start(name, policy, dtype, options | {"betas": (0.0, 0.99)})) for name in ("emulated", "cpu")]
    check(*both)


def of_any_size(dtype: torch.dtype, seed: int, least: int, most: int, n: int = 3000) -> torch.Tensor:
    """Both signs, exponents from `least` to `most`, as far as the type has them."""
    draw = torch.Generator().manual_seed(seed)
    x = (1 + torch.rand(n, generator=draw)) * 2.0 ** torch.randint(least, most, (n,), generator=draw)
    return (x * torch.randint(-1, 2, (n,), generator=draw)).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("policy", [0, 4, 10, 11, 15, 17])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "decouple": False}], ids=str)
def test_with_float32_state_every_bit_is_that_of_a_cpu(policy, decay):
    """Whatever the numbers: roots and quotients are exact, and x is rounded with the same bits. d stays."""
    dtype, options = POLICIES[policy]
    seen = []
    for name in ("emulated", "cpu"):
        x = of_any_size(dtype, 0, -30, 16)
        x[::98] = float("-inf")
        opt = Prodigy([nn.Parameter(x)], backend=name, d_coef=1e-30, eps=1e-25, **options, **decay)
        for k in range(1, 4):
            p = params(opt)[0]
            if k == 3:  # what x is then is the change
                opt.state[p]["exp_avg"].mul_(of_any_size(torch.float32, 9, -120, 1))
                p.data[1::2] = 0
            p.grad = of_any_size(dtype, k, *((-20, 16) if k == 2 else (-140, -30))).where(x.isfinite(), torch.zeros(()))
            opt.step()
        seen.append(dict(fields(opt)))
    assert emulated.native.policy() == policy
    assert all(same(value, seen[1][key]) for key, value in seen[0].items())


def test_roots_of_the_smallest_numbers():
    """Where they are approximate: v is subnormal, and eps less than its root."""
    seen = []
    for name in ("emulated", "cpu"):
        opt = Prodigy([nn.Parameter(torch.ones(3000))], backend=name, d_coef=1e-30, eps=1e-15, **NARROW)
        for k in range(4):
            params(opt)[0].grad = of_any_size(torch.float32, k, -45, -39)
            opt.step()
        seen.append(params(opt)[0].detach())
    assert torch.allclose(*seen, rtol=0, atol=2**-22) and (seen[1] - 1).abs().median() > 2**-18


@pytest.mark.parametrize("options", [NARROW, EIGHT], ids=str)
def test_the_least_start(options):
    """Where there is no gradient, the approximate quotient is that of 0 and the smallest normal number."""
    opt = Prodigy([nn.Parameter(torch.ones(5000))], backend="emulated", d0=1.001 * 2**-96, eps=2**-30, **options)
    for _ in range(2):
        params(opt)[0].grad = torch.arange(5000) % 3 * 1e-6
        opt.step()
    assert (params(opt)[0] == 1).all()


@wants_grad_dtype
@pytest.mark.parametrize(("policy", "last"), [(4, ANY), (22, ANY_CODED), (25, ANY_CODED)])
def test_gradients_of_another_type_run_in_the_last_policy_that_fits(policy, last):
    opt, other = (start(name, policy, *POLICIES[policy]) for name in ("emulated", "cpu"))
    for wide in (False, True, False):
        for o in (opt, other):
            for p in params(o):
                p.grad_dtype = None
                p.grad = (p.detach() / 4 + 1).to(torch.float32 if wide else p.dtype)
            o.step()
        assert emulated.native.policy() == (last if wide else policy)
    check(opt, other)
