"""``state_dtype="8bit"``: codes of m, v, s and x - x0, with a scale for every 256 of them."""

import copy
import io
import math

import numpy as np
import prodigyopt
import pytest
import torch
from toolbox import D0, device_of, parameters, refused, train
from torch import nn

from prodigy_fused import Prodigy, coded_state
from prodigy_fused.eight_bits import BLOCK, CODES, decode, encode
from prodigy_fused.rounding import random_bits

BF16, F16 = torch.bfloat16, torch.float16
EIGHT = {"state_dtype": "8bit", "min_8bit_size": 1}
DRAWS = 1 << 16
ROUNDED = ["exp_avg_sq", "s", "delta"]  # stochastically
# A short last block, several rows, one element, a channels_last convolution, none.
SHAPES = [(BLOCK + 37,), (3, 2 * BLOCK + 5), (), (2, 3, 4, 50), (0,)]


def make(device="cpu", dtype=torch.float32, shapes=SHAPES, seed=1):
    draw = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=draw).to(device, dtype)) for s in shapes]
    if shapes is SHAPES:
        params[3].data = params[3].data.to(memory_format=torch.channels_last)
    return params


def tensors(opt, p):
    return {key: t for key, t in opt.state[p].items() if isinstance(t, torch.Tensor)}


def values(key, n=40 * BLOCK + 37, seed=0):
    """Numbers of all sizes, blocks of very different ones."""
    draw = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** (160 * torch.rand(n // BLOCK + 1, generator=draw) - 100).repeat_interleave(BLOCK)[:n]
    numbers = torch.randn(n, generator=draw) * torch.randn(n, generator=draw).mul(2).exp() * sizes
    numbers[::17] = 0
    # Roots are less than 2^64 and more than 2^-66, or v is no normal float32.
    return numbers.abs().clamp(2.0**-40, 2.0**60) if key == "exp_avg_sq" else numbers


def draws(numbers, step=3):
    return random_bits(torch.empty(numbers.shape), step, 1)


def in_units(key, numbers, scale):
    unit = 2.0 ** (scale.double() - CODES[key].bias)
    return numbers.double() / unit.repeat_interleave(BLOCK)[: len(numbers)]


def spacing_of(key, units):
    """From a code's number to the next, in units."""
    least, digits = {"exp_avg": (-6, 3), "s": (5, 5)}.get(key, (0, 0))
    powers = units.abs().log2().floor().clamp_min(least) if digits else torch.zeros_like(units)
    return 2.0 ** (powers - digits)


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CODES)
def test_the_unit_is_the_least_with_which_nothing_is_cut_off(key):
    numbers = values(key)
    codes, scale = encode(CODES[key], numbers, draws(numbers))
    units = in_units(key, numbers, scale).abs()
    largest = torch.stack([block.max() for block in units.split(BLOCK)])
    assert bool(((largest > CODES[key].largest / 2) & (largest <= CODES[key].largest)).all())
    found = in_units(key, decode(CODES[key], codes, scale), scale)
    spacing = spacing_of(key, units)
    limit = 0.5 if key == "exp_avg" else 1.0
    assert bool(((found - in_units(key, numbers, scale)).abs() <= limit * spacing).all())


@pytest.mark.parametrize("key", CODES)
def test_what_codes_stand_for_stays(key):
    code, numbers = CODES[key], values(key)
    codes, scale = encode(code, numbers, draws(numbers))
    stored = decode(code, codes, scale)
    for bits in (None, draws(numbers, step=4)):
        assert torch.equal(decode(code, *encode(code, stored, bits)), stored)
    again = encode(code, stored, None, scale)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)
    other = encode(code, numbers, None, scale)  # which does not fit
    nearest = encode(code, numbers)
    assert torch.equal(decode(code, *other), decode(code, *nearest))


@pytest.mark.parametrize("key", ROUNDED)
def test_rounding_is_right_on_average(key):
    """Nearest would be off by up to half a unit."""
    numbers = torch.linspace(0.013, 3.3, BLOCK)
    if key != "exp_avg_sq":
        numbers[::2].neg_()
    many = numbers.repeat(DRAWS // BLOCK)
    codes, scale = encode(CODES[key], many, draws(many))
    stored = in_units(key, decode(CODES[key], codes, scale), scale).view(-1, BLOCK)
    units = in_units(key, numbers, scale[:1])
    spacing = spacing_of(key, units)
    part = (units / spacing) % 1
    deviation = spacing * (part * (1 - part) / len(stored)).sqrt()
    error = stored.mean(0) - units
    counts = units.abs() > 1  # a smaller root is not rounded to 0
    assert bool((error.abs() <= 5 * deviation + 2 * spacing / len(stored))[counts].all())
    assert (error / deviation)[counts & (part > 0.05) & (part < 0.95)].square().mean() < 1.6


def test_no_root_becomes_zero():
    numbers = torch.full((BLOCK,), 1e-9)
    numbers[0] = 1.0
    numbers[1] = 0.0
    codes, _ = encode(CODES["exp_avg_sq"], numbers, draws(numbers))
    assert codes[1] == 0 and codes[2:].eq(1).all() and codes[0] == 128


@pytest.mark.parametrize("key", ROUNDED)
def test_what_grows_by_little_grows(key):
    """Beyond powers of two, too, where a rounding that was cut off would stop for good."""
    n = 200 * BLOCK
    numbers = torch.ones(n)
    for k in range(150):
        numbers = numbers * 1.005
        stored = encode(CODES[key], numbers, random_bits(numbers, k, 0))
        numbers = decode(CODES[key], *stored)
    assert numbers.double().mean() == pytest.approx(1.005**150, rel=0.01)


@pytest.mark.parametrize("key", ROUNDED)
def test_what_decays_by_little_decays(key):
    """By less than a tenth of a unit, in a step, of which no part is lost."""
    n = 100 * BLOCK
    numbers = torch.linspace(2, 60, BLOCK).repeat(n // BLOCK)
    start, steps = numbers.double().mean(), 200
    for k in range(steps):
        numbers = numbers * 0.9995
        numbers[::BLOCK] = 0.9 * CODES[key].largest  # so that the unit is 1
        numbers = decode(CODES[key], *encode(CODES[key], numbers, random_bits(numbers, k, 0)))
    numbers[::BLOCK] = 2 * 0.9995**steps
    assert numbers.double().mean() / start == pytest.approx(0.9995**steps, rel=0.002)


def test_what_is_not_finite_stays_finite():
    for key, code in CODES.items():
        numbers = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 1e-45, 0.0, -0.0])
        numbers = numbers.abs() if key == "exp_avg_sq" else numbers
        stored = decode(code, *encode(code, numbers, draws(numbers)))
        assert bool(stored.isfinite().all()) and stored[5] == 0 == stored[6]
        assert bool(coded_state.load(key, *encode(code, numbers)[:1], _column(code, numbers)).isfinite().all())


def _column(code, numbers):
    scale = torch.zeros(1, len(CODES), dtype=torch.uint8)
    scale[:, code.column] = encode(code, numbers)[1]
    return scale


# -- steps -------------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"slice_p": 3},
    {"betas": (0.0, 0.9)},
    {"weight_decay": 0.1, "decouple": False, "use_bias_correction": True},
    {"weight_decay": 0.01, "slice_p": 2, "safeguard_warmup": True},
]
DTYPES = [(torch.float32, None), (BF16, "stochastic"), (BF16, "24bit"), (F16, None), (BF16, "nearest")]
KINDS = [(options, *DTYPES[0]) for options in OPTIONS] + [(OPTIONS[i % 2], *kind) for i, kind in enumerate(DTYPES[1:])]


def decoded(opt, p, state=None):
    """The numbers of a parameter's state."""
    state = tensors(opt, p) if state is None else state
    coded = coded_state.in_codes(state)  # not of a tensor without elements
    return coded_state.numbers_of(p.detach(), state, opt.param_groups[0]) if coded else state


@pytest.mark.parametrize(("options", "dtype", "mode"), KINDS, ids=str)
def test_every_backend_has_the_same_codes(backend, options, dtype, mode):
    """But where a number in float32 is rounded to one side of a limit, or to the other. d is at rest."""
    seen = []
    for b in (backend, type(backend)("reference")):
        params = make(b.device, dtype)
        opt = b(params, **EIGHT, low_precision=mode, **{"d0": D0, "d_limit": D0, **options})
        for t in range(3):
            for i, p in enumerate(params):
                draw = torch.Generator().manual_seed(100 * t + i)
                wide = mode == "stochastic" and i == 1 and hasattr(p, "grad_dtype")
                if wide:
                    p.grad_dtype = None
                p.grad = torch.randn(p.shape, generator=draw).to(b.device, torch.float32 if wide else dtype)
            opt.step()
        seen.append(opt)
    different = {key: 0 for key in CODES}
    for p, q in zip(*map(parameters, seen), strict=True):
        states = tensors(seen[0], p), tensors(seen[1], q)
        mine, other = decoded(seen[0], p), decoded(seen[1], q)
        assert states[0].keys() == states[1].keys()
        for key, t in states[0].items():
            o = states[1][key]
            assert t.dtype == o.dtype and t.shape == o.shape and t.stride() == o.stride()
            if key in CODES and t.dtype == CODES[key].storage:
                different[key] += int((t.cpu() != o.cpu()).sum())
                size = other[key].abs().max().cpu() if t.numel() else 0
                assert (mine[key].cpu() - other[key].cpu()).abs().max() <= size / 8 if t.numel() else True
    total = sum(p.numel() for p in parameters(seen[0]))
    assert all(count <= 0.01 * total + 2 for count in different.values()), different


def test_the_step_is_made_of_what_is_stored(backend):
    """Not of m and v before they are rounded: else `finish` would take back, or correct, another step."""
    p = make(backend.device, shapes=[(5 * BLOCK,)])[0]
    opt = backend([p], **EIGHT, d0=D0, d_limit=D0)
    for t in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p)
        opt.step()
        state = tensors(opt, p)
        m, v = (coded_state.load(key, state[key], state["scale"]).double() for key in ("exp_avg", "exp_avg_sq"))
        step = D0 * m / (v.sqrt() + D0 * 1e-8)
        error = (before.double() - step - p.detach()).abs()
        assert bool((error <= 2.0**-23 * before.abs() + 2.0**-20 * step.abs()).all())
        assert step.abs().mean() > 1e-5


def test_x_minus_delta_remains_x0(backend):
    p = make(backend.device, shapes=[(20 * BLOCK,)])[0]
    x0 = p.detach().clone()
    opt = backend([p], **EIGHT, d0=D0, d_limit=D0)
    steps = 10
    for t in range(steps):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p) + 1
        opt.step()
    state = tensors(opt, p)
    delta = coded_state.load("delta", state["delta"], state["scale"])
    error = (p.detach() - delta - x0).double()
    unit = delta.abs().max() / 63.5
    deviation = unit.item() / 2 * math.sqrt(steps)
    assert bool((error.abs() <= 7 * deviation).all())
    assert error.mean().abs() <= 5 * deviation / math.sqrt(p.numel())
    assert (p.detach() - x0).abs().mean() > 5 * unit


def gradients(steps, n, signal, noise):
    """A direction that fades, and noise: then s decays."""
    draw = np.random.default_rng(3)
    fixed = signal * draw.normal(size=n)
    for t in range(steps):
        yield torch.from_numpy(fixed * max(0.0, 1 - t / 300) + noise * draw.normal(size=n)).float()


@pytest.mark.parametrize(("options", "signal", "noise"), [({}, 1, 0.3), ({}, 0, 1), ({"slice_p": 11}, 1, 0.3)], ids=str)
def test_the_estimate_after_2000_steps(options, signal, noise):
    """Of the same gradients, within 5 %. On the fastest backend: all have the same codes."""
    found = {}
    for name, more in (("float32", {}), ("8bit", EIGHT)):
        p = nn.Parameter(torch.linspace(-1, 1, 3000))
        opt = Prodigy([p], **more, **options, d0=1e-4, d_limit=1e-4)
        for g in gradients(2000, 3000, signal, noise):
            p.grad = g
            opt.step()
        found[name] = opt.param_groups[0]["d_denom"], opt.param_groups[0]["d_numerator"]
    assert found["8bit"][0] == pytest.approx(found["float32"][0], rel=0.05)
    assert signal == 0 or found["8bit"][1] == pytest.approx(found["float32"][1], rel=0.05)


def test_masks_and_bad_gradients(backend):
    """An infinite x stays, and neither it nor a NaN spoils its block."""
    p = make(backend.device, shapes=[(2 * BLOCK,)])[0]
    with torch.no_grad():
        p[0] = -math.inf
    opt = backend([p], **EIGHT, d0=D0, weight_decay=0.1)
    for t in range(4):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p)
        p.grad[0] = 0
        if t == 2:
            p.grad[3] = math.nan
        opt.step()
    assert p[0] == -math.inf and bool(p[1:].isfinite().all())
    assert opt.d > D0 and opt.param_groups[0]["nonfinite_steps"] == 1
    state = tensors(opt, p)
    delta = coded_state.load("delta", state["delta"], state["scale"])
    assert delta[0] == 0 and bool(delta.isfinite().all()) and delta.abs().max() > 0


# -- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype", "most"),
    [
        ({}, torch.float32, 4.1),
        ({"slice_p": 11}, torch.float32, 2.8),
        ({"slice_p": 11, "low_precision": "stochastic"}, BF16, 2.8),
        ({"slice_p": 11}, BF16, 3.8),
    ],
    ids=str,
)
def test_bytes(options, dtype, most):
    p = nn.Parameter(torch.ones(100, 1000).to(dtype))
    opt = Prodigy([p], state_dtype="8bit", **options)
    p.grad = torch.ones_like(p)
    opt.step()
    assert sum(t.nbytes for t in tensors(opt, p).values()) <= most * p.numel()


def test_small_tensors_stay_float32():
    params = [nn.Parameter(torch.ones(n)) for n in (4095, 4096)]
    opt = Prodigy(
        [{"params": params}, {"params": [nn.Parameter(torch.ones(10))], "min_8bit_size": 10}], state_dtype="8bit"
    )
    train(opt, steps=1)
    small, large, own = parameters(opt)
    assert opt.state[small]["exp_avg"].dtype == torch.float32 and "p0" in opt.state[small]
    assert opt.state[large]["exp_avg"].dtype == opt.state[own]["exp_avg"].dtype == torch.uint8
    double = nn.Parameter(torch.ones(5000, dtype=torch.float64))
    opt = Prodigy([double], state_dtype="8bit")
    train(opt, steps=1)
    assert opt.state[double]["s"].dtype == torch.float64


@pytest.mark.parametrize("options", [{"low_precision": "displacement"}, {"min_8bit_size": 0}], ids=str)
def test_what_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Prodigy([nn.Parameter(torch.ones(3))], state_dtype="8bit", **options)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved(opt, compact=False):
    file = io.BytesIO()
    torch.save(opt.compact_state_dict() if compact else opt.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()))


CHECKPOINTS = [({}, torch.float32), ({"slice_p": 3}, torch.float32), ({"low_precision": "24bit"}, BF16), ({}, F16)]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("options", "dtype"), CHECKPOINTS, ids=str)
def test_a_resumed_run_has_the_same_bits(backend, options, dtype, compact):
    opt = backend(make(backend.device, dtype), **EIGHT, d0=D0, **options)
    train(opt, steps=3)
    state = saved(opt, compact)
    weights = [p.detach().clone() for p in parameters(opt)]
    again = backend(make(backend.device, dtype, seed=2), **EIGHT, d0=D0, **options)
    again.load_state_dict(state)
    for p, w in zip(parameters(again), weights, strict=True):
        p.data.copy_(w)  # also after the optimizer's state
    exact = [each.float32_weights() for each in (opt, again)]
    for p, q in zip(parameters(opt), parameters(again), strict=True):
        assert torch.equal(exact[0][p], exact[1][q])
    train(opt, again, steps=2, start=3)
    for p, q in zip(parameters(opt), parameters(again), strict=True):
        assert torch.equal(p, q)
        mine, other = tensors(opt, p), tensors(again, q)
        assert mine.keys() == other.keys()
        assert all(torch.equal(t, other[key]) for key, t in mine.items())
    assert opt.d == again.d


@pytest.mark.parametrize("options", [{}, {"slice_p": 3}], ids=str)
def test_to_prodigyopt_and_back(options):
    opt = Prodigy(make(), **EIGHT, d0=D0, **options)
    train(opt, steps=3)
    codes = {i: tensors(opt, p) for i, p in enumerate(parameters(opt))}
    theirs = prodigyopt.Prodigy([nn.Parameter(p.detach().clone()) for p in parameters(opt)], d0=D0, **options)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()))
    train(theirs, steps=1, start=3)
    back = Prodigy([nn.Parameter(p.detach().clone()) for p in parameters(opt)], **EIGHT, d0=D0, **options)
    back.load_state_dict(state)
    for p in parameters(back):
        p.grad = torch.zeros_like(p)
    back.param_groups[0]["lr"] = 0.0
    back.step()  # which changes nothing but the form of the state
    for i, p in enumerate(parameters(back)):
        for key, t in tensors(back, p).items():
            differs = key == "scale" and p.numel() > 0  # torch made numbers of it
            assert differs or torch.equal(t, codes[i][key]) or key in CODES, key
        mine, other = decoded(back, p), decoded(back, p, codes[i])
        assert all(torch.equal(mine[key], other[key]) for key in CODES if key in mine), i
    # After a step of theirs, x - x0 is what x and p0 say.
    moved = Prodigy([nn.Parameter(p.detach().clone()) for p in parameters(theirs)], **EIGHT, d0=D0, **options)
    moved.load_state_dict(theirs.state_dict())
    train(moved, theirs, steps=1, start=4)
    assert moved.d == pytest.approx(float(theirs.param_groups[0]["d"]), rel=0.05)


@pytest.mark.parametrize("options", [{}, {"slice_p": 3}], ids=str)
def test_a_change_of_the_format_converts(backend, options):
    opt = backend(make(backend.device), d0=D0, **options)
    train(opt, steps=3)
    before = {i: tensors(opt, p) for i, p in enumerate(parameters(opt))}
    opt.param_groups[0].update(EIGHT)
    x = [p.detach().clone() for p in parameters(opt)]
    opt.param_groups[0]["lr"] = 0.0
    train(opt, steps=1, start=3)
    for p in filter(torch.numel, parameters(opt)):
        assert opt.state[p]["exp_avg"].dtype == torch.uint8
        assert ("p0" in opt.state[p]) == ("slice_p" in options)
    opt.param_groups[0]["state_dtype"] = "float32"
    train(opt, steps=1, start=4)
    for i, p in enumerate(parameters(opt)):
        assert torch.equal(p, x[i])
        for key, t in tensors(opt, p).items():
            assert t.dtype == torch.float32 and "scale" not in opt.state[p]
            error = (t - before[i][key]).abs().max() if t.numel() else torch.zeros(())
            assert error <= before[i][key].abs().max().item() / 16 if t.numel() else True, key


def test_from_codes_to_a_displacement():
    """And back: each keeps x - x0."""
    opt = Prodigy(make(dtype=F16), **EIGHT, d0=D0)
    train(opt, steps=3)
    before = [decoded(opt, p)["delta"].clone() for p in parameters(opt)[:4]]
    for change in ({"state_dtype": "float32", "low_precision": "displacement"}, {**EIGHT, "low_precision": None}):
        opt.param_groups[0].update({**change, "lr": 0.0})
        train(opt, steps=1, start=3)
    for p, delta in zip(parameters(opt), before, strict=False):
        assert torch.allclose(decoded(opt, p)["delta"], delta, rtol=0, atol=float(delta.abs().max()) / 100)


def test_another_memory_format_has_other_blocks(backend):
    opt = backend(make(backend.device), **EIGHT, d0=D0)
    train(opt, steps=2)
    p = parameters(opt)[3]
    before = decoded(opt, p)
    p.data = p.data.contiguous()
    opt.param_groups[0]["lr"] = 0.0
    train(opt, steps=1, start=2)
    after = decoded(opt, p)
    for key in CODES:
        assert after[key].stride() == p.stride()
        assert torch.allclose(after[key], before[key], rtol=0.07, atol=before[key].abs().max().item() / 100), key


def test_a_scale_that_does_not_fit_is_refused():
    opt = Prodigy(make(), **EIGHT)
    train(opt, steps=1)
    state = opt.compact_state_dict()
    state["state"][1]["scale"] = state["state"][1]["scale"][:1]
    again = Prodigy(make(), **EIGHT)
    with refused(again, ValueError, "'scale' of parameter 1 of shape (3, 517)", "(7, 4)"):
        again.load_state_dict(state)


def test_a_start_that_was_taken_away_is_missed():
    opt = Prodigy(make(), **EIGHT)
    train(opt, steps=1)
    del opt.state[parameters(opt)[1]]["delta"]
    with pytest.raises(ValueError, match=r"'delta' of parameter 1 of shape \(3, 517\)"):
        train(opt, steps=1)


def test_parameters_that_cannot_move_are_noticed(backend):
    opt = backend(make(backend.device, BF16), **EIGHT, low_precision="nearest")
    with pytest.warns(UserWarning, match=r"parameter \d .* no element .* has moved in 10 steps"):
        train(opt, steps=10)


def test_it_is_there_on_the_fastest_backend():
    if device_of("cpu") is None:
        pytest.skip("no compiled module")
    opt = Prodigy([nn.Parameter(torch.ones(5000))], state_dtype="8bit", fused=True)
    train(opt, steps=1)
    assert opt.d > 0
