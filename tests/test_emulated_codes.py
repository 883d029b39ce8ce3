"""Codes of 8 bits by the functions of the CUDA kernels, run by the CPU: those of eight_bits.py, bit by bit."""

import math

import emulated
import pytest
import torch

from prodigy_fused.eight_bits import BLOCK, CODES, blocks_of, decode, encode
from prodigy_fused.rounding import fourth, random_bits, second, third

pytestmark = pytest.mark.skipif(emulated.native is None, reason=str(emulated.MISSING))

DRAWS = {"exp_avg": lambda bits: None, "exp_avg_sq": second, "s": third, "delta": fourth}
LARGEST = 3.4e38


def numbers_of_all_sizes(key):
    """Blocks of very different sizes; in each of them, numbers that are far less than the largest, too."""
    draw = torch.Generator().manual_seed(0)
    n = 120 * BLOCK + 37
    sizes = 2.0 ** (270 * torch.rand(blocks_of(n), generator=draw) - 145).repeat_interleave(BLOCK)[:n]
    numbers = torch.randn(n, generator=draw) * torch.randn(n, generator=draw).mul(4).exp() * sizes
    numbers[::17] = 0
    numbers[: 5 * BLOCK : BLOCK] = torch.tensor([math.inf, -math.inf, math.nan, LARGEST, 1e-45])
    numbers[6 * BLOCK : 7 * BLOCK] = 0.0
    numbers[7 * BLOCK : 8 * BLOCK] = torch.linspace(-CODES[key].largest, CODES[key].largest, BLOCK)
    numbers[8 * BLOCK : 9 * BLOCK] = torch.linspace(-1, 1, BLOCK) * 2.0**-6  # e4m3's subnormal numbers, and others
    numbers[8 * BLOCK] = CODES[key].largest
    if key != "exp_avg_sq":
        return numbers
    return torch.where(numbers == 0, 0.0, numbers.abs().clamp_min(2.0**-74.5))  # the least root of a float32


@pytest.mark.parametrize("key", CODES)
def test_the_codes_of_numbers(key):
    code, numbers, step = CODES[key], numbers_of_all_sizes(key), 5
    n = numbers.numel()
    codes, scale = torch.empty(n, dtype=torch.uint8), torch.empty(blocks_of(n), dtype=torch.uint8)
    decoded = torch.empty(n)
    getattr(emulated.native.code, key)(*(t.data_ptr() for t in (numbers, codes, scale, decoded)), n, step)
    wanted, bytes_wanted = encode(code, numbers, DRAWS[key](random_bits(torch.empty(n), step, 0)))
    assert torch.equal(scale, bytes_wanted)
    assert torch.equal(codes.view(wanted.dtype), wanted)
    assert torch.equal(decoded, decode(code, wanted, scale))
    assert len(codes.unique()) > (250 if key == "s" else 200)
