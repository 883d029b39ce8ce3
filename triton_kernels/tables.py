"""What the host tells the kernels: rows of 8-byte words, a word a field, in the order of the fields."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rule import Estimate, Hyper, Shared

MAX_DIMS = 8


class Tensor(NamedTuple):
    """One tensor: addresses (0: there is none, and x0 is zero everywhere), sizes, and the order of its memory."""

    x: Any
    m: Any
    v: Any
    s: Any
    x0: Any
    delta: Any  # where there is one, x is x0 + delta, rounded
    numel: Any
    slice_p: Any  # with slice_p > 1, s and x0 are packed samples
    group: Any
    first_chunk: Any
    index: Any  # for random bits
    stochastic: Any  # how x is rounded, if it has 16 bits and no delta
    dims: Any  # 0: row-major; else so many strides follow, and as many row-major ones, from the outermost inwards


class Gradient(NamedTuple):
    """One tensor's gradient in one step: its address (0: the tensor is left alone), and the bits of an element."""

    at: Any
    bits: Any


# Where a tensor's strides begin. A row is a multiple of 16 bytes, and so what comes behind the rows is aligned.
ORDER = tl.constexpr(14)
STRIDES = tl.constexpr(MAX_DIMS)
TENSOR_WORDS = tl.constexpr(14 + 2 * MAX_DIMS)
GROUP_WORDS = tl.constexpr(12)


@triton.jit
def load_number(word, place):
    """The number in a word, or the one whose address and bits are at `place`."""
    number = tl.load(word)
    place = place.to(tl.pointer_type(tl.int64))
    address = tl.load(place)
    if address != 0:
        if tl.load(place + 1) == 32:
            number = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
        else:
            number = tl.load(address.to(tl.pointer_type(tl.float64)))
    return number


@triton.jit
def load_shared(row):
    return Shared(tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), load_number(row + 4, row + 5))


@triton.jit
def load_estimate(row):
    return Estimate(
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
    )


@triton.jit
def store_estimate(row, e):
    tl.store(row, e.d)
    tl.store(row + 1, e.d_max)
    tl.store(row + 2, e.d_hat)
    tl.store(row + 3, e.d_numerator)
    tl.store(row + 4, e.d_denom)
    tl.store(row + 5, e.k)
    tl.store(row + 6, e.nonfinite_steps)
    tl.store(row + 7, e.corrections)


@triton.jit
def load_hyper(groups, group):
    row = groups + group * GROUP_WORDS
    return Hyper(
        load_number(row, row + 9),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
    )


@triton.jit
def load_tensor(tensors, index):
    row = tensors + index * TENSOR_WORDS
    return Tensor(
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
        tl.load(row + 9),
        tl.load(row + 10).to(tl.uint32),
        tl.load(row + 11) != 0,
        tl.load(row + 12),
    )


@triton.jit
def load_grad(grads, index):
    row = grads + 2 * index
    return Gradient(tl.load(row), tl.load(row + 1))
