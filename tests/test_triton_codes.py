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
from prodigy_fused.rounding import fourth, random_bits

pytestmark = pytest.mark.skipif(device_of("triton") is None, reason="no Triton here")

STEP = 5


def numbers():
    """Of all sizes, block by block; a number of each code and half-way to the next; what is at the limits."""
    draw = torch.Generator().manual_seed(7)
    n = 60 * BLOCK
    sizes = (2.0 ** (270 * torch.rand(n // BLOCK, generator=draw) - 145)).repeat_interleave(BLOCK)
    spread = torch.randn(n, generator=draw) * torch.randn(n, generator=draw).mul(4).exp() * sizes
    whole = torch.arange(BLOCK) / 256.0
    floats = torch.arange(126).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (floats[:-1] + floats[1:]) / 2
    special = [math.inf, -math.inf, math.nan, 3.4e38, 2.0**127, -(2.0**-149), 1e-40, 0.0, -0.0, 1.0]
    e4m3 = torch.cat([floats, middle, torch.tensor([-448.0, -1.0, 0.0, -0.0, 447.9])])
    return torch.cat([spread, whole, whole * 2 + 1 / 256, e4m3, e4m3 * 2.0**-140, torch.tensor(special)])


@pytest.mark.parametrize("x", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", CODES)
def test_the_same_codes_as_in_python(key, x):
    run = importlib.import_module("triton_codes").run
    code, values = CODES[key], numbers()
    values = values.abs() if key == "exp_avg_sq" else values
    wanted, column = encode(code, values, fourth(random_bits(values, STEP, 0)))
    codes, scale = torch.empty_like(wanted), torch.full((len(column), len(CODES)), 77, dtype=torch.uint8)
    run(values, codes, scale, code.column, x, step=STEP)
    assert torch.equal(codes, wanted) and torch.equal(scale[:, code.column], column)
    others = [other for other in range(len(CODES)) if other != code.column]
    assert bool((scale[:, others] == 77).all())
    assert torch.equal(values, decode(code, wanted, column))


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
