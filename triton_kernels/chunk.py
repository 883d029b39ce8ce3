"""One chunk of one tensor, as one program takes it: which walks there are over its elements.

Constants: see elements.py.
"""

import triton
import triton.language as tl

from .coded_walk import finish_coded_walk, update_coded_walk
from .elements import SOME, is_aligned, is_coded, size_of
from .rounding import CORRECTION_STREAM, STEP_STREAM, random_bits
from .rule import STEP
from .samples import sample_walk
from .walk import THREADS, finish_walk, sums_of, update_walk


@triton.jit
def base_of_random_bits(t, S: tl.constexpr):
    """Returns what is added to an element's index for the one that its random bits go by: that in the whole tensor.

    Blocks of codes are those of this tensor, whatever it is a part of, and so are then the bits.
    """
    if is_coded(S):
        return tl.zeros([], tl.int64)
    else:
        return t.base


@triton.jit
def update_elements(
    t, grad, random, begin, c, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates a chunk, see `update_walk`."""
    if is_coded(S):
        return update_coded_walk(t, grad, random, begin, c, X, G, SAMPLES, KEPT, CHUNK, BLOCK, ALIGNED)
    else:
        return update_walk(t, grad, random, begin, c, X, S, G, SAMPLES, KEPT, CHUNK, BLOCK, ALIGNED)


@triton.jit
def update_chunk(
    order, t, grad, begin, c, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates m, v, s and x of a chunk, x with the old d.

    Returns the chunk's part of lr*bc * sum <g, x0 - x> and of sum |s|, in float64.
    """
    random = random_bits(c.k, t.index, STEP_STREAM, base_of_random_bits(t, S) + begin)
    dot, norm = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    if SAMPLES == SOME:
        S_OF_SAMPLES: tl.constexpr = tl.float32 if is_coded(S) else S
        size = size_of(t, begin, CHUNK, False)
        dot, norm = sums_of(
            *sample_walk(order, t, grad, random, begin, size, c, X, S_OF_SAMPLES, G, KEPT, CHUNK, 2 * THREADS)
        )
        tl.debug_barrier()  # the walk overwrites the x of the samples
    if is_aligned(t, grad, S, SAMPLES, KEPT):
        all_dot, all_norm = update_elements(t, grad, random, begin, c, X, S, G, SAMPLES, KEPT, CHUNK, BLOCK, True)
    else:
        all_dot, all_norm = update_elements(t, grad, random, begin, c, X, S, G, SAMPLES, KEPT, CHUNK, BLOCK, False)
    return (dot + all_dot) * c.dot_weight, norm + all_norm


@triton.jit
def finish_elements(
    t, grad, random, begin, c, how, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Moves x of a chunk, see `finish_walk`."""
    if is_coded(S):
        finish_coded_walk(t, grad, random, begin, c, how, X, G, SAMPLES, KEPT, CHUNK, BLOCK, ALIGNED)
    else:
        finish_walk(t, grad, random, begin, c, how, X, S, G, KEPT, CHUNK, BLOCK, ALIGNED)


@triton.jit
def finish_chunk(
    t, grad, begin, c, how, X: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SAMPLES: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves x of a chunk, see `finish_walk`."""
    stream = tl.where(how == STEP, STEP_STREAM, CORRECTION_STREAM)
    random = random_bits(c.k, t.index, stream, base_of_random_bits(t, S) + begin)
    if is_aligned(t, grad, S, SAMPLES, KEPT):
        finish_elements(t, grad, random, begin, c, how, X, S, G, SAMPLES, KEPT, CHUNK, BLOCK, True)
    else:
        finish_elements(t, grad, random, begin, c, how, X, S, G, SAMPLES, KEPT, CHUNK, BLOCK, False)
