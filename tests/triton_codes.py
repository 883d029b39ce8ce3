"""Runs the encoding of triton_kernels/codes.py on whole tensors. To be imported only where there is Triton."""

import torch
import triton
import triton.language as tl
from prodigy_fused.triton_kernels.codes import code_array, load_codes, places, scale_array, store_codes
from prodigy_fused.triton_kernels.rounding import draw, random_bits, third

BLOCK = 1 << 12


@triton.jit
def convert_kernel(numbers, codes, scale, n, step, X: tl.constexpr, CODE: tl.constexpr, ENCODE: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """Converts between numbers and codes, in the order that the steps of an x of type X have; addresses are given."""
    begin = (tl.program_id(0) * BLOCK).to(tl.int64)
    at = places(0, tl.minimum(n - begin, BLOCK), X, BLOCK)
    codes = code_array(tl.load(codes), begin, CODE, False)
    scale = scale_array(tl.load(scale), begin)
    if ENCODE:
        random = random_bits(step.to(tl.uint32), tl.zeros([], tl.uint32), 0, begin)
        value = tl.load(numbers + begin + at.i, at.mask, 0.0)
        stored = store_codes(codes, scale, value, third(draw(random, at.i)), at, CODE)
    else:
        stored = load_codes(codes, scale, at, CODE)
    tl.store(numbers + begin + at.i, stored, at.mask)


def run(numbers, codes, scale, code, x="float32", step=None):
    """Encodes `numbers` with the random bits of a step, and has them be what is stored; without a step, decodes.

    code: its column of scale.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers_there, *others = on_device = [t.to(device) for t in (numbers, codes, scale)]
    addresses = [torch.tensor([t.data_ptr()], device=device) for t in others]
    convert_kernel[(triton.cdiv(numbers.numel(), BLOCK),)](
        numbers_there, *addresses, numbers.numel(), step or 0, X=getattr(tl, x), CODE=code, ENCODE=step is not None,
        BLOCK=BLOCK,
    )  # fmt: skip
    for to, t in zip((numbers, codes, scale), on_device, strict=True):
        to.copy_(t)
