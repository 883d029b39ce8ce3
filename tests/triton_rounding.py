"""Runs the conversions of triton_kernels/rounding.py on whole tensors. To be imported only where there is Triton."""

import torch
import triton
import triton.language as tl
from prodigy_fused.triton_kernels.rounding import array, draw, kept_value, load, random_bits, stochastic_24, store

BLOCK = 1 << 12


@triton.jit
def convert_kernel(
    wide, stored, n, key, TYPE: tl.constexpr, WIDEN: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Converts between float32 and TYPE; `wide` and `stored` hold the addresses of the two arrays."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    floats = array(tl.load(wide), 0, tl.float32, False) + i
    halves = array(tl.load(stored), 0, TYPE, False) + i
    if WIDEN:
        store(floats, load(halves, i < n, TYPE), i < n, tl.float32)
    else:
        k, tensor = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
        begin = tl.load(key + 3)
        random = draw(random_bits(k, tensor, tl.load(key + 2), begin), i)
        store(halves, load(floats, i < n, tl.float32), i < n, TYPE, STOCHASTIC, random)


@triton.jit
def convert_24_kernel(floats, halves, bytes_, n, step, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """Converts between float32, and a bfloat16 and a byte."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if KEPT:
        tl.store(floats + i, kept_value(tl.load(halves + i, i < n, 0), tl.load(bytes_ + i, i < n, 0)), i < n)
    else:
        random = draw(random_bits(step.to(tl.uint32), tl.zeros([], tl.uint32), 0, tl.zeros([], tl.int64)), i)
        x, low = stochastic_24(tl.load(floats + i, i < n, 0.0), random)
        tl.store(halves + i, x, i < n)
        tl.store(bytes_ + i, low, i < n)


def run_24(floats, x, low, step=None):
    """Converts `floats` into `x` and `low` (bfloat16, int8) with the random bits of a step; without one, back."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device = [t.to(device) for t in (floats, x.view(torch.uint16), low)]
    grid = (triton.cdiv(floats.numel(), BLOCK),)
    convert_24_kernel[grid](*on_device, floats.numel(), step or 0, KEPT=step is None, BLOCK=BLOCK)
    for to, t in zip((floats, x.view(torch.uint16), low), on_device, strict=True):
        to.copy_(t)


def run(name, t, to, step=0, tensor=0, correction=False, begin=0):
    """Converts `t` into `to`; name: widen, nearest or stochastic."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, target = t.to(device), to.to(device)
    stored, wide = (source, target) if name == "widen" else (target, source)
    addresses = [torch.tensor([x.data_ptr()], device=device) for x in (wide, stored)]
    key = torch.tensor([step, tensor, int(correction), begin], device=device)
    convert_kernel[(triton.cdiv(t.numel(), BLOCK),)](
        *addresses, t.numel(), key, getattr(tl, str(stored.dtype).removeprefix("torch.")), name == "widen",
        name == "stochastic", BLOCK,
    )  # fmt: skip
    to.copy_(target)
