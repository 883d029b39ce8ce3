"""The samples of a chunk where slice_p > 1, before the walk that moves x.

Note [Samples first]
One element of slice_p is a sample. Were it sought in the walk over all elements, each of them would cost a division,
and a few lanes of a block would load s and x0 for all. So the samples of a chunk have a loop of their own: their s and
x0 lie side by side, their gradients and x are gathered, and bring into the cache what the walk reads next.

Constants: see elements.py.
"""

import triton
import triton.language as tl

from .elements import load_grads, load_x, masked
from .rounding import array, draw, load, store, third
from .rule import gradient, sample
from .tables import load_strides


@triton.jit
def row_major_of(order, dims, position):
    """Returns the row-major positions of elements at positions in memory. order: the tensor's strides."""
    row_major = tl.zeros_like(position)
    for k in tl.range(0, dims):
        stride, row_major_stride = load_strides(order, k)
        row_major += position // stride * row_major_stride
        position = position % stride
    return row_major


@triton.jit
def sample_block(
    t, grad, random, begin, i, index, mask, c, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Updates the s of samples: i, their positions in the chunk; index, their places among all samples.

    Returns each one's terms of sum <g, x0 - x> and of sum |s|.
    """
    x = load_x(array(t.x, begin, X, False) + i, array(t.low, begin, tl.int8, False) + i, mask, X, KEPT)
    grads = load_grads(grad, begin, i, mask, X, G, False)
    s_pointers = array(t.s, 0, S, False) + index
    old_s = load(s_pointers, mask, S)
    x0 = load(array(t.x0, 0, X, False) + index, masked(t.x0 != 0, mask), X)
    s, dot_terms, norm_terms = sample(gradient(grads, x, c), x0 - x, old_s, c)
    bits = third(draw(random, random.lead + i)) if S.primitive_bitwidth == 16 else 0
    store(s_pointers, s, mask, S, True, bits)
    return dot_terms, norm_terms


@triton.jit
def sample_walk(
    order, t, grad, random, begin, size, c, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates the s of a chunk's samples, which are the elements at row-major positions 0, p, 2p, ...

    Returns each lane's part of sum <g, x0 - x> and of sum |s|. (What is masked has the terms 0.)
    """
    dot = tl.zeros([BLOCK], c.d.dtype)
    norm = tl.zeros([BLOCK], c.d.dtype)
    if t.dims == 0:
        g = t.base + begin  # the chunk's first element in the whole tensor, of which this may be a shard
        first_sample = (g + t.slice_p - 1) // t.slice_p
        first_index = first_sample - (t.base + t.slice_p - 1) // t.slice_p
        # 32-bit offsets within the chunk. Both are clamped to its size: a larger distance means no sample here, a
        # larger period no second one.
        offset = tl.minimum(first_sample * t.slice_p - g, CHUNK).to(tl.int32)
        period = tl.minimum(t.slice_p, CHUNK).to(tl.int32)
        count = (size - offset + period - 1) // period
        for first in tl.range(0, count, BLOCK):
            j = first + tl.arange(0, BLOCK)
            i, index = offset + j * period, first_index + j
            dot_terms, norm_terms = sample_block(t, grad, random, begin, i, index, j < count, c, X, S, G, KEPT)
            dot += dot_terms
            norm += norm_terms
    else:  # every element is looked at
        for first in tl.range(0, size, BLOCK):
            i = first + tl.arange(0, BLOCK)
            row_major = row_major_of(order, t.dims, begin + i)
            mask = (i < size) & (row_major % t.slice_p == 0)
            index = row_major // t.slice_p
            dot_terms, norm_terms = sample_block(t, grad, random, begin, i, index, mask, c, X, S, G, KEPT)
            dot += dot_terms
            norm += norm_terms
    return dot, norm
