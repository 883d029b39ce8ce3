"""Runs the conversions of triton_kernels/rounding.py on whole tensors. To be imported only where there is Triton."""

import torch
import triton
import triton.language as tl
from prodigy_fused.triton_kernels.rounding import array, draw, load, random_bits, store

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
