"""``low_precision="24bit"``: a bfloat16 and a byte, which together keep 24 bits of a weight."""

import importlib
import math

import emulated
import pytest
import torch
from toolbox import D0, device_of, feed, make_params, parameters, train
from torch import nn

from prodigy_fused import Prodigy
from prodigy_fused.rounding import kept_value, random_bits, stochastic_24

BF16 = torch.bfloat16
MODE = {"low_precision": "24bit"}
LOWS = torch.tensor([-128, -127, -1, 0, 1, 126, 127], dtype=torch.int8)
UNIT = 2.0**-15  # of the last place, between 1 and 2
DRAWS = 1 << 18


def every():
    """All bfloat16 numbers, each beside some bytes."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(BF16)
    return numbers.repeat_interleave(len(LOWS)), LOWS.repeat(len(numbers))


def same(a, b):
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())).all())


def floats():
    """Of all sizes, also those that 24 bits can represent, and those in the middle between two of 16 or 24 bits."""
    draw = torch.Generator().manual_seed(5)
    sizes = torch.randn(50_000, generator=draw) * 2.0 ** (torch.rand(50_000, generator=draw) * 270 - 145)
    kept = kept_value(*every())[:: len(LOWS) + 1]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3.4028e38, -3.4028e38])
    middle = (kept.view(torch.int32) + 0x80).view(torch.float32)
    return torch.cat([sizes, kept, middle[kept.isfinite()], special])


def decoded(x, low):
    """What the two keep, in float64: the number, and as many 256ths of the way to the next one as the byte says."""
    exact = x.double()
    away = (x.view(torch.int16) + 1).view(BF16).double()  # of the next size: half a unit, where it is another one
    inner = (x.view(torch.int16) - 1).view(BF16).double()
    unit = torch.where(low < 0, exact - inner, torch.where(away.isfinite(), away - exact, exact - inner))
    return torch.where(x == 0, exact, exact + unit * low / 256)


# -- the encoding ------------------------------------------------------------------------------------------------------


def test_x_is_what_is_kept_rounded_to_nearest():
    x, low = every()
    kept, exact = kept_value(x, low).double(), x.double()
    counts = x.isfinite() & (x != 0)
    assert torch.equal(kept[~counts].nan_to_num(7), exact[~counts].nan_to_num(7))
    x, low, kept, exact = (t[counts] for t in (x, low, kept, exact))
    assert torch.equal(kept, decoded(x, low))
    assert bool((kept.sign() == exact.sign()).all())


def test_what_24_bits_can_represent_stays():
    x, low = every()
    counts = x.isfinite() & (x != 0)
    again = stochastic_24(kept_value(x, low), random_bits(x, 3, 1))
    assert same(again[0], x) and torch.equal(again[1], torch.where(counts, low, 0))


@pytest.mark.parametrize("value", [1.0, -1.3, 1.99999, 0.0078125 * 0.99999, -3e-5, 2e-39, 3.3e38])
def test_rounding_is_unbiased(value):
    value = torch.tensor(value)
    kept = kept_value(*stochastic_24(value.expand(DRAWS), random_bits(torch.empty(DRAWS), 7, 3))).double()
    unit = 2.0 ** max(math.frexp(value.item())[1] - 16, -141)
    assert bool(((kept - value.double()).abs() < unit).all())
    assert abs(kept.mean() - value.double()) <= 5 * unit / 2 / math.sqrt(DRAWS) + unit * 2.0**-9


@pytest.mark.parametrize("language", ["cpp", "triton"])
def test_the_same_bits_as_in_python(language):
    if (emulated.native if language == "cpp" else device_of("triton")) is None:
        pytest.skip(f"no {language} here")
    values, (x, low) = floats(), every()
    wanted = stochastic_24(values, random_bits(values, 9, 0))
    found = torch.empty_like(values, dtype=BF16), torch.empty_like(values, dtype=torch.int8)
    kept = torch.empty(x.shape)
    if language == "cpp":
        emulated.native.stochastic_24(*(t.data_ptr() for t in (values, *found)), values.numel(), 9)
        emulated.native.kept_value(*(t.data_ptr() for t in (x, low, kept)), x.numel())
    else:
        run = importlib.import_module("triton_rounding").run_24
        run(values, *found, step=9)
        run(kept, x, low)
    assert same(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert torch.equal(kept.nan_to_num(7), kept_value(x, low).nan_to_num(7))


# -- steps -------------------------------------------------------------------------------------------------------------


def test_steps_of_a_fraction_of_a_unit_add_up(backend):
    """Each rounding is off by less than a unit, by nothing on average: so the sum over many elements is exact."""
    steps, n = (12, 1000) if backend.small else (40, 20_000)
    start = 1 + torch.rand(n, generator=torch.Generator().manual_seed(2)) / 2
    p = nn.Parameter(start.to(backend.device, BF16))
    exact = nn.Parameter(p.detach().float().clone())
    opts = [backend([x], d0=1e-6, d_limit=1e-6, **more) for x, more in ((p, MODE), (exact, {}))]
    for _ in range(steps):
        for opt, x in zip(opts, (p, exact), strict=True):
            x.grad = torch.ones_like(x)
            opt.step()
    error = (opts[0].float32_weights()[p] - exact.detach()).double()
    deviation = UNIT / 2 * math.sqrt(steps)  # of one element, at most: a rounding's variance is at most a quarter
    assert bool((error.abs() <= 7 * deviation).all())
    assert error.mean().abs() <= 5 * deviation / math.sqrt(n)
    assert (exact.detach() - start.to(exact)).abs().mean() > 50 * deviation / math.sqrt(n)  # what nearest would lose
    assert torch.equal(p, start.to(p))  # x itself has coarser units


@pytest.mark.parametrize(
    "options",
    [{}, {"slice_p": 3}, {"betas": (0.0, 0.75)}, {"weight_decay": 0.1, "decouple": False}],
    ids=str,
)
def test_every_backend_keeps_the_same_bits(backend, options):
    """Steps that, with these numbers, are exact to the last division, and a first step that `finish` takes."""
    seen = []
    for b in (backend, type(backend)("reference")):
        draw = torch.Generator().manual_seed(1)
        shapes = [(70,), (33, 17), (), (3, 1025), (2, 3, 4, 5), (0,)]
        params = [nn.Parameter(torch.randn(s, generator=draw).to(b.device, BF16)) for s in shapes]
        params[4].data = params[4].data.to(memory_format=torch.channels_last)
        opt = b(params, **MODE, **{"d0": 2.0**-10, "betas": (0.5, 0.75), "d_coef": 16.0, **options})
        for _ in range(3):
            for p in params:
                p.grad = torch.where(torch.rand(p.shape, generator=draw) < 0.8, 155 / 128, -81 / 128).to(p)
            opt.step()
        seen.append((opt, [(p.detach().cpu(), opt.state[p]["low"].cpu()) for p in params]))
    (ours, bits), (theirs, other) = seen
    assert ours.d == pytest.approx(theirs.d, rel=1e-5) and ours.d > 2.0**-10
    differ = sum(int(((x != y) | (a != b)).sum()) for (x, a), (y, b) in zip(bits, other, strict=True))
    assert differ <= 0.08 * sum(x.numel() for x, _ in bits)  # float32 sums may differ in their last place
    kept = [[kept_value(*pair) for pair in each] for each in (bits, other)]
    for a, b in zip(*kept, strict=True):
        assert torch.allclose(a, b, rtol=3 * UNIT, atol=1e-6)
        assert a.numel() == 0 or a.isfinite().all()
    assert sum(int((low != 0).sum()) for _, low in bits) > 0.9 * sum(x.numel() for x, _ in bits)


def test_samples_are_those_of_what_is_kept(backend):
    """A byte's last place is some steps long here, and x itself does not move: d is that of the bytes, or another."""
    draw = torch.Generator().manual_seed(4)
    p = nn.Parameter((1 + torch.rand(300, generator=draw)).to(backend.device, BF16))
    x0, every_7th = p.detach().cpu().clone(), slice(None, None, 7)
    opt = backend([p], d0=1e-6, slice_p=7, **MODE)
    numerator, s = 0.0, torch.zeros(43, dtype=torch.float64)
    for _ in range(5):
        g = torch.rand(300, generator=draw).to(BF16)
        kept = decoded(p.detach().cpu(), opt.state[p]["low"].cpu()) if opt.state[p] else x0.double()
        moved, sampled, rate = (x0 - kept)[every_7th], g.double()[every_7th], opt.d * opt.d / 1e-6
        numerator = math.sqrt(0.999) * numerator + rate * float(sampled @ moved)
        s = math.sqrt(0.999) * s + rate * sampled
        p.grad = g.to(p.device)
        opt.step()
        assert opt.report()["d_hat"] == pytest.approx(numerator / float(s.abs().sum()), rel=1e-4, abs=1e-12)
    assert torch.equal(p.cpu(), x0) and opt.d > 1.01e-6


# -- the byte ----------------------------------------------------------------------------------------------------------


def test_what_other_code_writes_stays(backend):
    """The byte, which is stale then, cannot contradict it."""
    opt = backend(make_params(BF16, backend.device), d0=1e-6, d_limit=1e-6, **MODE)
    train(opt, steps=3)
    p = parameters(opt)[0]
    written = torch.tensor([0.0, -0.0, 3.0, -1e-3, 2.0**-133, 1.0, 2.0, -4.0, 5.0, 6.0, 7.0, 8.0])
    with torch.no_grad():
        p.copy_(written.view_as(p))
    opt.state[p]["low"].copy_(torch.tensor([-128, -5, 127, -128] * 3).view_as(p))
    kept = opt.float32_weights()[p].flatten().cpu()
    assert torch.equal(kept.to(BF16)[:2].view(torch.int16), written.to(BF16)[:2].view(torch.int16))
    assert bool(((kept - written.to(BF16)).abs() <= 2.0**-8 * written.to(BF16).abs() + 1e-40).all())
    train(opt, steps=1, start=3)
    after = opt.float32_weights()[p].flatten().cpu()
    assert bool(((after - kept).abs() <= 1e-5 + 2 * UNIT * kept.abs()).all())


def test_infinities_are_no_nan(backend):
    opt = backend([nn.Parameter(torch.ones(3, device=backend.device, dtype=BF16))], **MODE)
    p = parameters(opt)[0]
    p.grad = torch.ones_like(p)
    opt.step()
    with torch.no_grad():
        p[:2] = torch.tensor([math.inf, -math.inf])
    opt.state[p]["low"].fill_(-7)
    p.grad = torch.ones_like(p)
    opt.step()
    assert p.tolist() == [math.inf, -math.inf, pytest.approx(1, abs=0.01)]
    assert opt.state[p]["low"].tolist()[:2] == [0, 0]


def test_into_and_from_a_run_without_it(backend):
    opt = backend(make_params(BF16, backend.device), d0=D0, **MODE)
    train(opt, steps=3)
    plain = backend(make_params(BF16, backend.device), d0=D0, low_precision="stochastic")
    plain.load_state_dict(opt.state_dict() | {"param_groups": plain.state_dict()["param_groups"]})
    train(plain, steps=1, start=3)
    assert all("low" not in plain.state[p] for p in parameters(plain))
    back = backend(make_params(BF16, backend.device), d0=D0, **MODE)
    back.load_state_dict(plain.state_dict() | {"param_groups": back.state_dict()["param_groups"]})
    weights = [p.detach().clone() for p in parameters(back)]
    assert all(
        torch.equal(back.float32_weights()[p], w.float()) for p, w in zip(parameters(back), weights, strict=True)
    )
    train(back, steps=1, start=4)
    assert all(back.state[p]["low"].dtype == torch.int8 for p in parameters(back))


def test_the_byte_moves_with_its_parameter():
    """To another memory format: it goes by the index."""
    opt = Prodigy(make_params(BF16), d0=D0, **MODE)
    train(opt, steps=2)
    p = parameters(opt)[3]
    low = opt.state[p]["low"].clone()
    p.data = p.data.contiguous()
    feed(opt, 2)
    for q in parameters(opt):
        q.grad.zero_()
    opt.state[p]["exp_avg"].zero_()
    opt.step()
    assert torch.equal(opt.state[p]["low"], low) and opt.state[p]["low"].stride() == p.stride()


@pytest.mark.parametrize("fused", [None, False])
def test_float16_is_refused(fused):
    with pytest.raises(ValueError, match=r"low_precision.*24bit.*float16.*\(4, 3\).*displacement"):
        Prodigy(make_params(torch.float16), fused=fused, **MODE)
    p = nn.Parameter(torch.ones(3, dtype=BF16))
    opt = Prodigy([p], fused=fused, **MODE)
    p.data = p.data.half()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="float16"):
        opt.step()
    assert not opt.state.get(p)


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["24bit", "displacement", "stochastic", None])
def test_float32_weights(mode):
    dtypes = [torch.float32, torch.float64] if mode is None else [BF16]
    params = [p for dtype in dtypes for p in make_params(dtype)]
    opt = Prodigy(params, d0=D0, low_precision=mode)
    before = opt.float32_weights()
    assert all(torch.equal(before[p], p.detach().to(before[p])) for p in params)
    train(opt, steps=4)
    exact = opt.float32_weights()
    assert list(exact) == params
    for p, value in exact.items():
        assert value.dtype == (p.dtype if mode is None else torch.float32)
        assert value.shape == p.shape and value.data_ptr() != p.data_ptr()
        own = opt.state[p]
        wanted = decoded(p.detach(), own["low"]) if mode == "24bit" else p.detach().double()
        if mode == "displacement":
            wanted = (own["p0"].float() + own["delta"]).double()  # which is x, rounded
            assert torch.equal(value.to(p.dtype), p.detach())
        assert torch.equal(value.double(), wanted)
    more = sum(int((value != p.float()).sum()) for p, value in exact.items() if mode)
    assert (more > 0) == (mode in ("24bit", "displacement"))


def test_weights_of_a_state_that_does_not_fit_are_refused():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = Prodigy([p], low_precision="24bit")
    p.grad = torch.ones_like(p)
    opt.step()
    saved = opt.state_dict()
    half = Prodigy([nn.Parameter(torch.ones(4, dtype=torch.float16))])
    with pytest.raises(ValueError, match='"24bit" for a float16 parameter'):
        half.load_state_dict(saved)
    assert not half.state
    p.data = torch.ones(3, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="parameter 0 of shape"):
        opt.float32_weights()
    p.data = torch.ones(4, dtype=torch.float16)
    with pytest.raises(ValueError, match='"24bit" for a float16 parameter'):
        opt.float32_weights()
    p.data = torch.ones(4)
    with pytest.raises(ValueError, match=r"parameter 0 of shape .* was cast to torch\.float32"):
        opt.float32_weights()
