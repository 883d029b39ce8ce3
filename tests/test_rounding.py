"""How numbers of 16 bits are rounded: the functions in Python, C++ and Triton, and every backend by its steps."""

import importlib
import math

import emulated
import pytest
import torch
from toolbox import device_of
from torch import nn

from prodigy_fused.rounding import (
    consecutive_bits,
    first,
    fourth,
    random_bits,
    row_bits,
    second,
    shifted,
    stochastic,
    third,
)

HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
DRAWS = 1 << 20
# Of every kind: normal, subnormal in 16 bits and in 32, at the limits, beyond float16.
VALUES = [1.0, -1.3, 1.0009765, 3e-5, -7.3e-8, 1e-9, 2.0**-14 * 0.9999, 65503.7, -65519.0, 65530.0, 1e38, 1e-40, 0.0]


def every(dtype):
    """All numbers of 16 bits, infinities and NaN among them."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def same_bits(a, b):
    """Equal bit by bit, but for the sign and the payload of a NaN."""
    both_nan = a.isnan() & b.isnan()
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | both_nan).all())


def neighbours(value, dtype):
    """The largest number of ``dtype`` of at most the size of a float32 ``value``, and the next."""
    size = value.abs()
    below = size.to(dtype)
    steps = below.view(torch.int16) - (below.float() > size).to(torch.int16)
    below, above = steps.view(dtype).float(), (steps + 1).view(dtype).float()
    return below, torch.where(below == size, below, above)


def spread(n=100_000):
    """Floats of all sizes that 16 bits have, and more."""
    draw = torch.Generator().manual_seed(3)
    exponents = torch.rand(n, generator=draw) * 80 - 45
    return torch.randn(n, generator=draw) * 2.0**exponents


# -- the function ------------------------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize("value", VALUES)
def test_rounding_is_unbiased(dtype, value):
    value = torch.tensor(value)
    drawn = stochastic(value.expand(DRAWS), dtype, random_bits(torch.empty(DRAWS), 7, 3)).double()
    low, high = neighbours(value, dtype)
    assert set(drawn.abs().unique().tolist()) <= {low.item(), high.item()}
    if low == high:
        return
    # Beyond the largest number a unit is as large as below it.
    unit = 2.0 ** (math.frexp(low.item())[1] - (8 if dtype == torch.bfloat16 else 11)) if high.isinf() else high - low
    part = min(float((value.abs() - low) / unit), 1.0)
    up = (drawn.abs() == high).double().mean().item()
    assert abs(up - part) <= 5 * math.sqrt(part * (1 - part) / DRAWS) + 2.0**-16


@each_half
def test_what_needs_no_rounding_stays(dtype):
    values = every(dtype)
    assert same_bits(stochastic(values.float(), dtype, random_bits(values, 0, 0)), values)


@each_half
def test_never_more_than_one_unit_away(dtype):
    values = spread()
    low, high = neighbours(values, dtype)
    size = stochastic(values, dtype, random_bits(values, 1, 2)).float().abs()
    assert bool(((size == low) | (size == high)).all())


def test_random_bits():
    p = torch.empty(1 << 18)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (2, 0, 0)]
    drawn = [random_bits(p, *key) for key in keys]
    drawn += [second(drawn[0]), third(drawn[0]), fourth(drawn[0])]
    drawn = [bits.long() & 0xFFFFFFFF for bits in drawn]
    for bits in drawn:
        assert abs(bits.double().mean() / 2**32 - 0.5) < 5 * math.sqrt(1 / 12 / p.numel())
        each_bit = torch.stack([bits >> i & 1 for i in range(32)]).double()
        errors = (each_bit.mean(1) - 0.5).abs() / 0.5 * 512
        assert errors[16:].max() < 5 and errors.max() < 5 * math.sqrt(8)
    below = [drawn[i] << 1 & 0xFFFFFFFF for i in (-3, -1)]  # the uppermost: for codes
    rolled = [drawn[i].roll(n) for i in (0, -3, -2, -1) for n in (1, 2, 3, 4, 5, 6, 7, 8, 1024)]
    for some in [*drawn, *rolled], [*drawn[:-3], drawn[-2], *below]:
        uniform = torch.stack(some).double() / 2**32 - 0.5
        correlation = (uniform @ uniform.T) / p.numel() * 12 - torch.eye(len(uniform))
        assert correlation.abs().max() < 6 / 512


def test_random_bits_go_by_the_position_in_memory():
    rows = random_bits(torch.empty(6, 4), 5, 1)
    assert torch.equal(rows.flatten(), random_bits(torch.empty(24), 5, 1))
    assert torch.equal(random_bits(torch.empty(4, 6).T, 5, 1), rows.view(4, 6).T)
    assert torch.equal(random_bits(torch.empty(6, 8)[:, ::2], 5, 1), rows)
    assert torch.equal(random_bits(torch.empty(4), torch.tensor(5.0, dtype=torch.float64), 1), rows.flatten()[:4])


@pytest.mark.parametrize("begin", [0, 3, (1 << 35) - 40, (1 << 35) - 43, 1 << 35, 5 << 40])
def test_random_bits_from_any_position(begin):
    """As a hash for each element has them, across the place where the upper half of the counter changes."""
    ours = consecutive_bits(7, 2, begin, 100, torch.device("cpu"))
    eights = [(begin + i) // 8 for i in range(100)]
    single = torch.tensor([2] * 100), torch.tensor(eights)
    of_each = row_bits(7, *single).view(100, -1)
    assert torch.equal(ours, torch.stack([of_each[i, (begin + i) % 8] for i in range(100)]))


@pytest.mark.parametrize("draw", [first, second, third])
def test_the_upper_bits_alone(draw):
    bits = random_bits(torch.empty(5000), 3, 1)
    for count in (8, 13, 16, 24):
        assert torch.equal(draw(bits, count), shifted(draw(bits), 32 - count))


# -- the functions in C++ and in Triton --------------------------------------------------------------------------------


@pytest.fixture(params=["cpp", "triton"])
def convert(request):
    """Takes 16 bits to float32 ("widen"), or float32 to 16 bits ("nearest", "stochastic"), not in Python."""
    language = request.param
    if (emulated.native if language == "cpp" else device_of("triton")) is None:
        pytest.skip(f"no {language} here")

    def call(name, t, dtype, *more):
        to = torch.empty(t.shape, dtype=torch.float32 if name == "widen" else dtype)
        if language == "triton":
            importlib.import_module("triton_rounding").run(name, t, to, *more)
        else:
            module = emulated.native.bfloat16 if dtype == torch.bfloat16 else emulated.native.float16
            getattr(module, name)(t.data_ptr(), to.data_ptr(), t.numel(), *more)
        return to

    return call


def floats(dtype):
    ties = every(dtype).float()
    ties = (ties + ties.roll(1)) / 2
    special = torch.tensor([*VALUES, math.inf, -math.inf, math.nan, -0.0, 65504.0, 65519.99, 65520.0, 3.4e38])
    return torch.cat([spread(), ties, special])


@each_half
def test_conversions_are_those_of_torch(convert, dtype):
    values = every(dtype)
    assert torch.equal(convert("widen", values, dtype).nan_to_num(7), values.float().nan_to_num(7))
    assert same_bits(convert("nearest", floats(dtype), dtype), floats(dtype).to(dtype))


@each_half
@pytest.mark.parametrize("key", [(0, 0, False), (1000, 7, False), (3_000_000_000, 2, True)], ids=str)
def test_the_same_bits_as_in_python(convert, dtype, key):
    step, tensor, correction = key
    values = floats(dtype)
    wanted = stochastic(values, dtype, random_bits(values, step, tensor, int(correction)))
    assert same_bits(convert("stochastic", values, dtype, step, tensor, correction, 0), wanted)


def test_positions_beyond_32_bits(convert):
    values = torch.full((1000,), 1.001)
    low, high, next_high = (convert("stochastic", values, HALVES[0], 1, 1, False, n << 32) for n in (0, 1, 2))
    assert 0 < (low != high).sum() < 500 and 0 < (high != next_high).sum() < 500


# -- the backends ------------------------------------------------------------------------------------------------------

SHAPES = [(70,), (33, 17), (), (3, 1025), (2, 3, 4, 5), (0,)]


def stepped(backend, dtype, steps, **options):
    """Parameters after steps that, with these numbers, are exact to the last division: all backends round the same."""
    draw = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(s, generator=draw).to(dtype).to(backend.device)) for s in SHAPES]
    params[4].data = params[4].data.to(memory_format=torch.channels_last)
    opt = backend(params, **{"d0": 2.0**-8, "betas": (0.5, 0.75), **options})
    for _ in range(steps):
        for p in params:
            signs = torch.rand(p.shape, generator=draw) < 0.8
            p.grad = torch.where(signs, 155 / 128, -81 / 128).to(p)
        opt.step()
    return [p.detach().cpu() for p in params], opt


@each_half
@pytest.mark.parametrize("slice_p", [1, 3])
@pytest.mark.parametrize("mode", ["stochastic", "displacement", "nearest"])
def test_equal_numbers_are_rounded_equally(backend, dtype, mode, slice_p):
    if mode == "displacement" and slice_p > 1:
        pytest.skip("refused")
    reference = type(backend)("reference")
    options = {"low_precision": mode, "slice_p": slice_p}
    for steps, tolerance in [(1, 0.0), (4, 0.005)]:  # later, float32 sums may differ in their last place
        (ours, opt), (theirs, other) = (stepped(b, dtype, steps, **options) for b in (backend, reference))
        assert opt.d == pytest.approx(other.d, rel=1e-6)
        differ = sum(int((p != q).sum()) for p, q in zip(ours, theirs, strict=True))
        assert differ <= tolerance * sum(p.numel() for p in ours)
        assert all(p.isfinite().all() for p in ours)


@each_half
def test_equal_state_is_rounded_equally(backend, dtype):
    states = []
    for b in (backend, type(backend)("reference")):
        # So that all three need rounding.
        _, opt = stepped(b, dtype, 1, state_dtype=torch.bfloat16, eps=0.1, lr=0.75, betas=(0.25, 0.75))
        states.append([opt.state[p] for group in opt.param_groups for p in group["params"]])
    for ours, theirs in zip(*states, strict=True):
        for key in ("exp_avg_sq", "exp_avg", "s"):
            assert same_bits(ours[key].cpu(), theirs[key].cpu())


@each_half
@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.75)}, {"weight_decay": 0.1}], ids=str)
def test_a_displacement_is_corrected_exactly(backend, dtype, options):
    """With so large an eps, what `finish` adds is no trifle."""
    options = {"low_precision": "displacement", "eps": 0.5, "d_coef": 16.0, **options}
    runs = [stepped(b, dtype, 5, **options) for b in (backend, type(backend)("reference"))]
    (_, opt), (_, other) = runs
    assert opt.d == pytest.approx(other.d, rel=1e-6) and opt.d > 2.0**-8
    for p, q in zip(*[[p for group in o.param_groups for p in group["params"]] for o in (opt, other)], strict=True):
        ours, theirs = opt.state[p]["delta"].cpu(), other.state[q]["delta"]
        assert p.numel() == 0 or (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@each_half
def test_what_finish_adds_is_rounded_with_bits_of_its_own(backend, dtype):
    if not backend.one_pass:
        pytest.skip("rounds x once a step")
    draw = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.randn(5000, generator=draw).to(dtype).to(backend.device))
    eps = 0.5  # so large that what is added is no trifle
    opt = backend([p], low_precision="stochastic", d0=2.0**-8, d_coef=16.0, eps=eps)
    for _ in range(3):
        before, old, k = p.detach().float(), opt.d, opt.step_count
        p.grad = torch.sign(p.detach() + 0.1)
        opt.step()
    assert opt.d > old
    m, root = opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"].sqrt()
    first, exact = (m / (root + d * eps) for d in (old, opt.d))
    updated = stochastic(before - old * first, dtype, random_bits(p, k, 0)).float()
    finished = stochastic(updated + old * (first - exact), dtype, random_bits(p, k, 0, stream=1))
    assert (updated != finished.float()).float().mean() > 0.01
    assert (finished != p.detach()).float().mean() < 0.01


@each_half
@pytest.mark.parametrize(("mode", "units"), [("stochastic", 1), ("24bit", 2**-7), ("displacement", 0), ("nearest", 1)])
def test_what_turns_out_to_be_no_step_is_undone(backend, dtype, mode, units):
    if (mode, dtype) == ("24bit", torch.float16):
        pytest.skip("refused")
    draw = torch.Generator().manual_seed(5)
    first, late = (nn.Parameter(torch.randn(300, generator=draw).to(backend.device, dtype)) for _ in range(2))
    opt = backend([first, late], low_precision=mode, d0=0.02, weight_decay=0.5)
    for both in (True, True, False):
        first.grad = torch.ones_like(first)
        late.grad = torch.zeros_like(late) if both else None
        opt.step()
    before, count = late.detach().float().clone(), opt.step_count
    first.grad, late.grad = None, torch.zeros_like(late)
    opt.step()
    assert opt.step_count == count
    moved = (late.detach().float() - before).abs()
    assert bool((moved <= units * torch.finfo(dtype).eps * before.abs() + 2.0**-24).all())


@each_half
@pytest.mark.parametrize("mode", ["stochastic", "displacement", "nearest"])
def test_no_step_changes_no_bit(backend, dtype, mode):
    numbers = every(dtype)[:: 61 if backend.crawls else 1].contiguous()
    still, other = (nn.Parameter(t.to(backend.device)) for t in (numbers, torch.ones(5, dtype=dtype)))
    opt = backend([still, other], low_precision=mode)
    before = still.detach().clone()
    for _ in range(3):
        still.grad, other.grad = torch.zeros_like(still), torch.ones_like(other)
        opt.step()
    finite = before.isfinite()
    assert torch.equal(still.detach()[finite], before[finite])
    assert not still.detach()[~finite].isfinite().any()  # 0 * inf in the weight decay is NaN, in float32 too
