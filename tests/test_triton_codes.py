"""State in 8 bits in Triton's kernels, besides what test_8bit.py asks of every backend."""

import importlib
import math

import pytest
import torch
from toolbox import device_of
from torch import nn

from prodigy_fused import Prodigy, plans
from prodigy_fused.dtensor import IndexMap
from prodigy_fused.eight_bits import BLOCK, CODES, decode, encode
from prodigy_fused.rounding import fourth, random_bits, shifted, third

pytestmark = pytest.mark.skipif(device_of("triton") is None, reason="no Triton here")

STEP = 5


def numbers(largest):
    """Of all sizes, block by block; a number of each code and half-way to the next; what is at the limits; blocks whose
    largest number is that of a code, or the next one."""
    draw = torch.Generator().manual_seed(7)
    n = 60 * BLOCK
    sizes = (2.0 ** (270 * torch.rand(n // BLOCK, generator=draw) - 145)).repeat_interleave(BLOCK)
    spread = torch.randn(n, generator=draw) * torch.randn(n, generator=draw).mul(4).exp() * sizes
    whole = torch.arange(BLOCK) / 256.0
    floats = torch.arange(126).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (floats[:-1] + floats[1:]) / 2
    special = [math.inf, -math.inf, math.nan, 3.4e38, 2.0**127, -(2.0**-149), 1e-40, 0.0, -0.0, 1.0]
    e4m3 = torch.cat([floats, middle, torch.tensor([-448.0, -1.0, 0.0, -0.0, 447.9])])
    exact, above = spread[: 2 * BLOCK].view(2, BLOCK).sign()
    exact[0] = largest
    above[0] = torch.tensor(largest).nextafter(torch.tensor(math.inf))
    return torch.cat([exact, above, spread, whole, whole * 2 + 1 / 256, e4m3, e4m3 * 2.0**-140, torch.tensor(special)])


def bits(code, values):
    """What Python rounds with where Triton's kernel is given the bits of a third value."""
    return (third if code is CODES["s"] else fourth)(random_bits(values, STEP, 0))


def encoded(code, values, x="float32"):
    """The codes of Triton's. They, the bytes and the numbers that they stand for are those of Python."""
    run = importlib.import_module("triton_codes").run
    wanted, column = encode(code, values, bits(code, values))
    stored, codes = values.clone(), torch.empty_like(wanted)
    scale = torch.full((len(column), len(CODES)), 77, dtype=torch.uint8)
    run(stored, codes, scale, code.column, x, step=STEP)
    assert torch.equal(codes, wanted) and torch.equal(scale[:, code.column], column)
    others = [other for other in range(len(CODES)) if other != code.column]
    assert bool((scale[:, others] == 77).all())
    assert torch.equal(stored, decode(code, wanted, column))
    return codes


@pytest.mark.parametrize("x", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", CODES)
def test_the_same_codes_as_in_python(key, x):
    values = numbers(CODES[key].largest)
    encoded(CODES[key], values.abs() if key == "exp_avg_sq" else values, x)


@pytest.mark.parametrize("key", ["exp_avg_sq", "s", "delta"])
def test_random_bits_count_to_the_last(key):
    """A fraction that makes one with them is rounded up, the one before it is not."""
    whole = 1 << CODES[key].places
    random = shifted(bits(CODES[key], torch.empty(4 * BLOCK)), 16) & whole - 1
    up = torch.arange(len(random)) % 2
    least = int(key == "exp_avg_sq")  # of which small ones are not rounded to 0
    values = least + (whole - random - 1 + up).float() / whole
    values[::BLOCK] = 0.9 * CODES[key].largest  # so that the unit is 1
    assert torch.equal(encoded(CODES[key], values)[1:BLOCK] - least, up[1:BLOCK].to(CODES[key].storage))


@pytest.mark.parametrize("key", CODES)
def test_the_same_numbers_as_in_python(key):
    """Of every code with every byte that there may be."""
    run = importlib.import_module("triton_codes").run
    code = CODES[key]
    every = torch.arange(256).to(torch.uint8)
    every = every[(every & 127) < 127] if code.column in (0, 2) else every  # 127 is NaN, and no code
    every = torch.cat([every, every[: BLOCK - len(every)]]).view(code.storage)
    bytes_ = torch.arange(131 if key == "exp_avg_sq" else 246).to(torch.uint8)
    codes, scale = every.repeat(len(bytes_)), torch.zeros(len(bytes_), len(CODES), dtype=torch.uint8)
    scale[:, code.column] = bytes_
    found = torch.empty(codes.shape)
    run(found, codes, scale, code.column)
    assert torch.equal(found.view(torch.int32), decode(code, codes, bytes_).view(torch.int32))


@pytest.mark.parametrize("slice_p", [1, 3])
def test_random_bits_of_a_shard_go_by_its_own_index(monkeypatch, slice_p):
    """As its blocks do; its samples are those of the whole."""
    maps, seen = {}, []
    monkeypatch.setattr(plans, "is_dtensor", lambda p: id(p) in maps)
    monkeypatch.setattr(plans, "index_map", lambda p: maps[id(p)])
    start, *grads = torch.randn(3, 2 * BLOCK + 3, generator=torch.Generator().manual_seed(2))
    for name in ("triton", "reference"):
        p = nn.Parameter(start.to(device_of(name), copy=True))
        maps[id(p)] = IndexMap((3 * BLOCK,), [torch.arange(13, 13 + p.numel())])
        opt = Prodigy([p], backend=name, state_dtype="8bit", min_8bit_size=1, slice_p=slice_p, d0=1e-3, d_limit=1e-3)
        for grad in grads:
            p.grad = grad.to(p)
            opt.step()
        seen.append({"x": p.detach(), **{key: t for key, t in opt.state[p].items() if key != "step"}})
    assert seen[0].keys() == seen[1].keys()
    for key, t in seen[0].items():
        assert (t.cpu() != seen[1][key]).sum() <= 0.01 * t.numel(), key


@pytest.mark.skipif(device_of("cpu") is None, reason="no compiled module")
@pytest.mark.parametrize(("dtype", "mode"), [(torch.float32, None), (torch.bfloat16, "24bit")], ids=str)
def test_corrections_and_a_step_that_was_none_have_the_same_codes_as_in_cpp(dtype, mode):
    """Both of them change codes of x - x0 in *finish*, which the backends in Python do not."""
    draw, seen = torch.Generator().manual_seed(3), []
    start, *grads = torch.randn(5, 3 * BLOCK + 5, generator=draw)
    for name in ("triton", "cpu"):
        p = nn.Parameter(start.to(device_of(name), dtype, copy=True))
        opt = Prodigy([p], backend=name, state_dtype="8bit", min_8bit_size=1, d0=1e-3, low_precision=mode)
        for grad in grads:
            p.grad = (1 + 0.1 * grad).to(p)
            if grad is grads[-1]:
                x, k = p.detach().clone(), opt.param_groups[0]["k"]
                p.grad.zero_()
                opt.state[p]["s"].zero_()
            opt.step()
        assert opt.param_groups[0]["corrections"] > 1 and opt.param_groups[0]["k"] == k
        assert torch.allclose(p, x, rtol=2.0**-7, atol=1e-6)
        seen.append({"x": p.detach(), **{key: t for key, t in opt.state[p].items() if key != "step"}})
    for key, t in seen[0].items():
        other = seen[1][key]
        # d is summed up in another order: so the last bit of a float32 may be another one.
        differs = t.cpu().double().sub(other.double()).abs() > (2.0**-22 * other.abs() if key == "x" else 0)
        assert differs.sum() <= 0.01 * t.numel(), key
