"""The steps in which something is missing, zero, infinite or switched off (docs/design.md, "Edge semantics")."""

import itertools
import math

import pytest
import torch
from oracle import Algorithm4, Pair, Prodigyopt, numpy, same, snapshot, worst
from torch import Tensor, nn

TOLERANCE = 1e-10
SHAPES = [(7, 5), (33,), (), (2, 3, 2, 2)]
OPTIONS = {
    "plain": {},
    "no momentum": {"betas": (0.0, 0.99)},
    "decoupled": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decouple": False},
    "sampled": {"slice_p": 2, "weight_decay": 0.1},
    "slow growth": {"growth_rate": 1.2, "d_coef": 0.5, "safeguard_warmup": True},
    "sampled, no momentum": {"slice_p": 3, "betas": (0.0, 0.99), "weight_decay": 0.1, "use_bias_correction": True},
}
# Coupled weight decay makes a zero gradient another one.
UNCOUPLED = {name: options for name, options in OPTIONS.items() if name != "coupled"}


def cases(table: dict):
    return pytest.mark.parametrize("options", table.values(), ids=table.keys())


def cases_and_dtypes(table: dict):
    """Each of the options with one dtype: both in turn."""
    dtypes = itertools.cycle([torch.float32, torch.float64])
    return pytest.mark.parametrize(
        ("options", "dtype"), list(zip(table.values(), dtypes, strict=False)), ids=table.keys()
    )


def start(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]


def gradients(both: Pair, scale: float = 1.0) -> list[Tensor]:
    """Of a distance, where the oracle is, with noise; in the order of the parameters of ``both``."""
    noise = torch.Generator().manual_seed(100 + both.k)
    return [scale * (p - 3 + torch.randn(p.shape, generator=noise, dtype=p.dtype)) for p in both.theirs]


def zeros() -> list[Tensor]:
    return [torch.zeros_like(p) for p in start()]


def pair(backend, *split: dict, oracle=Algorithm4, dtype=torch.float64, **options) -> Pair:
    """All parameters in one group, or dealt in turn to groups with the options ``split``."""
    split = split or ({},)
    groups = [{**group, "params": start()[i :: len(split)]} for i, group in enumerate(split)]
    return Pair(backend, oracle, groups, dtype, backend.device, d0=1e-4, **options)


def train(both: Pair, steps: int, *lrs: float, tolerance: float = TOLERANCE) -> None:
    for _ in range(steps):
        both.step(gradients(both), *lrs)
        both.check(tolerance)


# -- nothing to step on ------------------------------------------------------------------------------------------------


@cases_and_dtypes(UNCOUPLED)
def test_gradients_zero_from_the_start(backend, options, dtype):
    both = pair(backend, oracle=Prodigyopt, dtype=dtype, **options)
    for _ in range(4):
        both.step(zeros())
        assert both.unmoved()
        assert (both.opt.d, both.opt.step_count, both.opt.corrections) == (1e-4, 0, 0)
    train(both, 15, tolerance=TOLERANCE if dtype == torch.float64 else 0.01)
    assert both.opt.step_count == both.oracle.param_groups[0]["k"] == 15
    assert both.opt.d > 1e-4


@cases(UNCOUPLED)
def test_only_the_unsampled_gradients_from_the_start(backend, options):
    """den is 0, yet m and v are not: x must not move, k not advance."""
    both = pair(backend, oracle=Prodigyopt, **{**options, "slice_p": 2})
    for _ in range(4):
        grads = gradients(both)
        for g in grads:
            g.view(-1)[::2] = 0
        both.step(grads)
        assert both.unmoved()
        assert (both.opt.d, both.opt.step_count) == (1e-4, 0)
    train(both, 15)
    assert both.opt.step_count == both.oracle.param_groups[0]["k"]


@cases(UNCOUPLED)
def test_sums_zero_in_the_middle(backend, options):
    """beta3 = 0 forgets s, so that one step without a gradient at the sampled positions has den = 0 and a moving m."""
    both = pair(backend, oracle=Prodigyopt, **{**options, "beta3": 0.0, "slice_p": 2})
    train(both, 6)
    for _ in range(3):
        before, k_before = snapshot(both.opt), both.opt.step_count
        grads = gradients(both)
        for g in grads:
            g.view(-1)[::2] = 0
        both.step(grads)
        both.check(TOLERANCE)
        assert both.opt.step_count == k_before == both.oracle.param_groups[0]["k"]
        assert before[2] == snapshot(both.opt)[2]
    train(both, 10)


@cases(UNCOUPLED)
def test_a_late_gradient_that_is_zero(backend, options):
    """In the step in which only that one has a gradient, den is 0 although k is not."""
    both = pair(backend, oracle=Prodigyopt, **options)
    nothing = [None] * len(SHAPES)
    for _ in range(5):
        both.step([None, *gradients(both)[1:]])
        both.check(TOLERANCE)
    for _ in range(3):
        both.step([zeros()[0], *nothing[1:]])
        both.check(TOLERANCE)
        assert worst(numpy(both.ours[0]), numpy(both.start[0])) < 1e-15
        assert both.opt.step_count == both.oracle.param_groups[0]["k"] == 5
    train(both, 10)


@cases(OPTIONS)
def test_no_gradient_at_all(backend, options):
    both = pair(backend, oracle=Prodigyopt, **options)
    nothing = [None] * len(SHAPES)
    both.step(nothing)
    assert both.unmoved()
    train(both, 5)
    before = snapshot(both.opt)
    both.step(nothing)
    assert same(before, snapshot(both.opt))
    train(both, 5)


# -- lr ----------------------------------------------------------------------------------------------------------------


@cases(OPTIONS)
def test_a_group_with_lr_0_is_frozen(backend, options):
    both = pair(backend, {}, {"lr": 0.0}, **options)
    for _ in range(6):
        both.step(gradients(both))
        both.check(TOLERANCE)
        assert both.unmoved(2, 3)
    both.step(gradients(both), 1.0, 0.5)
    both.check(TOLERANCE)
    both.step(gradients(both), 1.0, 0.0)
    frozen = snapshot(both.opt)
    for _ in range(6):
        both.step(gradients(both))
        both.check(TOLERANCE)
        assert same([part[2:] for part in frozen[:2]], [part[2:] for part in snapshot(both.opt)[:2]])


@cases(OPTIONS)
def test_a_step_with_every_lr_0_is_inert(backend, options):
    both = pair(backend, {}, {}, **options)
    both.step(gradients(both), 0.0, 0.0)
    assert both.unmoved()
    train(both, 5, 1.0, 1.0)
    before = snapshot(both.opt)
    both.step(gradients(both), 0.0, 0.0)
    assert same(before, snapshot(both.opt))


@cases({**OPTIONS, "bias correction, safeguard": {"use_bias_correction": True, "safeguard_warmup": True}})
def test_each_group_has_its_own_lr(backend, options):
    lrs = [(1.0, 0.3, 2.0), (0.1, 1.0, 0.5), (0.7, 0.7, 0.7), (0.0, 1.0, 0.2)]
    both = pair(backend, {}, {}, {}, **options)
    for k in range(30):
        both.step(gradients(both), *lrs[k // 4 % len(lrs)])
        both.check(TOLERANCE)
    assert both.opt.corrections > 2


@pytest.mark.parametrize("bias", [False, True])
def test_each_group_has_its_own_betas(backend, bias):
    groups = [{"betas": (0.9, 0.999)}, {"betas": (0.0, 0.99)}, {"betas": (0.8, 0.9), "use_bias_correction": False}]
    train(pair(backend, *groups, beta3=0.98, use_bias_correction=bias, weight_decay=0.01), 30)


# -- the bound of d ----------------------------------------------------------------------------------------------------


@cases(OPTIONS)
def test_d_is_bounded(backend, options):
    """d_max is not; and a bound that is written later takes effect at once, and may be lifted again."""
    both = pair(backend, d_limit=3e-4, **options)
    train(both, backend.steps(30))
    assert both.opt.d == 3e-4
    if backend.crawls:
        return
    for limit in (2e-4, math.inf):
        both.oracle.d_limit = limit
        for group in both.opt.param_groups:
            group["d_limit"] = limit
        train(both, 2)
        assert both.opt.d == 2e-4 if limit < 1 else both.opt.d > 2e-4


# -- gradients that are not finite -------------------------------------------------------------------------------------


def estimate(both: Pair) -> list[float]:
    return [float(both.opt.param_groups[0][key]) for key in ("d", "d_max", "d_numerator", "d_denom", "d_hat")]


BAD = [(0, math.nan), (0, math.inf), (2, -math.inf), (12, math.nan)]


@pytest.mark.parametrize(
    ("options", "when", "value"),
    # All of the bad ones with the first options, with each of the others one.
    [(OPTIONS["plain"], *bad) for bad in BAD]
    + [(options, *bad) for options, bad in zip(OPTIONS.values(), itertools.cycle(BAD), strict=False) if options],
)
def test_one_bad_gradient(backend, options, when, value):
    both = pair(backend, **options)
    clean = pair(backend, **options)
    for k in range(16):
        clean.step(gradients(clean))
        grads = gradients(both)
        if k == when:
            grads[0].view(-1)[6] = value  # sampled, with slice_p 1, 2 and 3
            before = estimate(both)
        both.step(grads)
        both.check(TOLERANCE)
        if k == when:
            assert before == estimate(both)
            assert (both.opt.nonfinite_steps, both.opt.step_count) == (1, k + 1)
    assert both.opt.nonfinite_steps == both.oracle.nonfinite_steps == 1
    tensors, states, _ = snapshot(both.opt)
    assert all(
        t.isfinite().all()
        for t in [*tensors, *(t for state in states for t in filter(torch.is_tensor, state.values()))]
    )
    # Without x moved along the bad entry, and without that step's part of the sums, d grows all the same.
    assert both.opt.d > 10e-4
    assert 0.5 < both.opt.d / clean.opt.d < 2


def test_a_bad_gradient_that_is_not_sampled(backend):
    """The sums do not see it; it counts as zero."""
    both = pair(backend, slice_p=2)
    for k in range(10):
        grads = gradients(both)
        if k == 4:
            grads[0].view(-1)[5] = math.nan
        both.step(grads)
        both.check(TOLERANCE)
    assert all(p.isfinite().all() for p in both.ours)


@cases(UNCOUPLED)
def test_only_bad_gradients_from_the_start(backend, options):
    """They are none to step on, but counted."""
    both = pair(backend, **options)
    for k in range(3):
        both.step([torch.full_like(p, [math.nan, math.inf][k % 2]) for p in start()])
        assert both.unmoved()
        assert (both.opt.d, both.opt.step_count, both.opt.nonfinite_steps) == (1e-4, 0, k + 1)
    train(both, 10)
    assert both.opt.nonfinite_steps == both.oracle.nonfinite_steps == 3


def test_a_gradient_whose_square_is_beyond_float32(backend):
    p = nn.Parameter(torch.ones(3, device=backend.device))
    opt = backend([p], d0=1e-4)
    p.grad = torch.full_like(p, 3e23)  # (d * g)^2 is 9e38, (1 - beta2) of it 9e35
    opt.step()
    assert opt.state[p]["exp_avg_sq"].isfinite().all()


def test_negated_gradients(backend):
    """Of the phase of a conjugate, say: torch marks them, and memory holds minus their values."""
    ours, plain = (nn.Parameter(torch.ones((), dtype=torch.float64, device=backend.device)) for _ in range(2))
    both = [backend([p], d0=1e-2) for p in (ours, plain)]
    for _ in range(4):
        z = torch.complex(torch.zeros_like(ours), ours).conj()
        ours.grad = None
        (z.abs() - 3).square().backward()
        assert ours.grad.is_neg()
        plain.grad = ours.grad.resolve_neg()
        for opt in both:
            opt.step()
        assert torch.equal(ours, plain)
    assert plain > 1


def test_negated_gradients_of_several_elements(backend):
    ours, plain = (nn.Parameter(torch.ones(5, device=backend.device)) for _ in range(2))
    both = [backend([p], d0=1e-2) for p in (ours, plain)]
    for k in range(3):
        plain.grad = torch.arange(1.0, 6.0, device=backend.device) + k
        ours.grad = torch._neg_view(-plain.grad)
        for opt in both:
            opt.step()
        assert torch.equal(ours, plain)
    assert (plain < 1).all()


# -- gradients are read-only, scaled, skipped --------------------------------------------------------------------------

READ_ONLY = {
    **OPTIONS,
    "maximize": {"maximize": True, "weight_decay": 0.1, "decouple": False},
    "no momentum, coupled": {"betas": (0.0, 0.99), "weight_decay": 0.1, "decouple": False},
}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@cases_and_dtypes(READ_ONLY)
def test_gradients_are_never_written(backend, options, dtype, scale):
    both = pair(backend, dtype=dtype, **options)
    if scale != 1:
        both.opt.grad_scale = torch.tensor(scale, device=backend.device)
    for k in range(4):
        grads = gradients(both)
        if k == 2:
            grads[0].view(-1)[4] = math.nan
        given = []
        for p, g in zip(both.ours, grads, strict=True):
            p.grad = g.to(backend.device, dtype)
            given.append((p.grad, p.grad.clone()))
        both.opt.step()
        for p, (grad, value) in zip(both.ours, given, strict=True):
            assert p.grad is grad
            assert torch.equal(grad.nan_to_num(7.0), value.nan_to_num(7.0))


@cases_and_dtypes(READ_ONLY)
def test_scaled_gradients(backend, options, dtype):
    """A scale that is a power of two changes no bit."""
    scaled, plain = (pair(backend, dtype=dtype, **options) for _ in range(2))
    scaled.opt.grad_scale = torch.tensor(1024.0, device=backend.device)
    scaled.opt.found_inf = torch.tensor(0.0, device=backend.device)
    for _ in range(12):
        scaled.step(gradients(plain, 1024.0))
        plain.step(gradients(plain))
        assert same(snapshot(scaled.opt), snapshot(plain.opt))
    assert plain.opt.d != 1e-4 or options.get("maximize")


@cases_and_dtypes(READ_ONLY)
def test_found_inf_skips_the_step(backend, options, dtype):
    skipping, plain = (pair(backend, dtype=dtype, **options) for _ in range(2))
    skipping.opt.grad_scale = torch.tensor(2.0, device=backend.device)

    def skip():
        skipping.opt.found_inf = torch.tensor(1.0, device=backend.device)
        grads = gradients(plain)
        grads[1][3] = math.inf
        before = snapshot(skipping.opt)
        skipping.step(grads)
        after = snapshot(skipping.opt)
        before[1] = [old or new for old, new in zip(before[1], after[1], strict=True)]  # it may create state
        assert same(before, after)
        skipping.opt.found_inf = torch.tensor(0.0, device=backend.device)

    skip()
    for k in range(6):
        skipping.step(gradients(plain, 2.0))
        plain.step(gradients(plain))
        if k in (0, 3):
            skip()
    assert same(snapshot(skipping.opt), snapshot(plain.opt))


@cases(OPTIONS)
def test_maximize_negates_the_gradient(backend, options):
    up, down = pair(backend, maximize=True, **options), pair(backend, **options)
    for _ in range(10):
        up.step(gradients(down, -1.0))
        down.step(gradients(down))
    assert same([p.detach() for p in up.ours], [p.detach() for p in down.ours])
    assert up.opt.d == down.opt.d > 1e-4
    up.check(TOLERANCE)
