"""The tables that the host writes and the kernels read: rows of 8-byte words, each found by the name of its field.

The order of the words is the order of the names below. ``prodigy_fused.record`` packs the numbers of a step: one STEP,
then one GROUP per parameter group, and ``prodigy_fused.backends.triton`` compares its names with these when it loads
the kernels. All rows are multiples of 16 bytes, so what follows a row is aligned, too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .estimate import Estimate, EstimateOptions
from .rule import Hyper

MAX_DIMS = 8


class Tensor(NamedTuple):
    """One tensor of a plan: addresses (0: there is no such array), sizes, and the order of its memory."""

    x: Any
    m: Any
    v: Any
    s: Any  # 0: the tensor is not sampled, because its estimate is frozen
    x0: Any  # 0: x0 is zero everywhere, or not needed
    delta: Any  # where there is one, x is x0 + delta, rounded; or codes of x - x0, in the place of x0
    low: Any  # where there is one, 8 more bits of x
    scale: Any  # where there is one, m, v and s are codes
    numel: Any
    base: Any  # of a shard, the index of its first element in the whole tensor; else 0
    slice_p: Any  # with slice_p > 1, s and x0 are packed samples
    group: Any
    first_chunk: Any
    index: Any  # for random bits
    stochastic: Any  # how x is rounded, if it has 16 bits, no delta and no low
    dims: Any  # how many strides follow, see `tensor_row`; 0: row-major


class Gradient(NamedTuple):
    """One tensor's gradient in one step: its address (0: the tensor is left alone), and the bits of an element."""

    address: Any
    bits: Any


# A scalar that may be on the device takes three words: its value; an address, or 0 if the value counts; and the size
# in bits, 32 or 64, of the number at that address.
ESTIMATE_FIELDS = Estimate._fields
STEP_FIELDS = (
    "grad_scale", "grad_scale_address", "grad_scale_bits",
    "found_inf", "found_inf_address", "found_inf_bits",
)  # fmt: skip
# "estimate" is the index of the group's estimate: 0 if all groups share one, else the group's own.
GROUP_FIELDS = (*Hyper._fields, *EstimateOptions._fields, "estimate", "lr_address", "lr_bits")
TENSOR_FIELDS = Tensor._fields
GRADIENT_FIELDS = Gradient._fields


def padded(words: int) -> int:
    """Returns a number of words rounded up to a multiple of 16 bytes."""
    return words + words % 2


ESTIMATE_ROW_WORDS = padded(len(ESTIMATE_FIELDS))
STEP_ROW_WORDS = padded(len(STEP_FIELDS))
GROUP_ROW_WORDS = padded(len(GROUP_FIELDS))
ORDER_WORD = padded(len(TENSOR_FIELDS))  # where a tensor's strides begin
TENSOR_ROW_WORDS = ORDER_WORD + 2 * MAX_DIMS


def tensor_row(tensor: Tensor, order: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the words of a tensor's row, for the host.

    Args:
        order: for each dimension, from the outermost in memory inwards, its stride and its row-major stride; empty if
            the tensor is row-major.
    """
    words = [*tensor, *[0] * (ORDER_WORD - len(tensor))]
    for strides in ([stride for stride, _ in order], [row_major for _, row_major in order]):
        words += strides + [0] * (MAX_DIMS - len(strides))
    return words


# -- in the kernels ----------------------------------------------------------------------------------------------------

# The only globals that a kernel may read are constants of this kind, and every launch compares them with what they were
# when it was compiled. So there is one per row and not one per word.
_ESTIMATE = tl.constexpr(ESTIMATE_FIELDS)
_STEP = tl.constexpr(STEP_FIELDS)
_GROUP = tl.constexpr(GROUP_FIELDS)
_TENSOR = tl.constexpr(TENSOR_FIELDS)
_GRADIENT = tl.constexpr(GRADIENT_FIELDS)
_MAX_DIMS = tl.constexpr(MAX_DIMS)
_ESTIMATE_ROW_WORDS = tl.constexpr(ESTIMATE_ROW_WORDS)
_GROUP_ROW_WORDS = tl.constexpr(GROUP_ROW_WORDS)
_GRADIENT_ROW_WORDS = tl.constexpr(padded(len(GRADIENT_FIELDS)))
_ORDER_WORD = tl.constexpr(ORDER_WORD)
_TENSOR_ROW_WORDS = tl.constexpr(TENSOR_ROW_WORDS)


@triton.constexpr_function
def word(fields, name):
    """Returns the position of a field in its row. A constant: it is computed when a kernel is compiled."""
    return fields.index(name)


@triton.jit
def as_integers(row):
    """Returns a pointer to the same row of words, read as integers."""
    return row.to(tl.pointer_type(tl.int64))


@triton.jit
def load_scalar(row, VALUE: tl.constexpr, ADDRESS: tl.constexpr, BITS: tl.constexpr):
    """Returns a scalar that may be on the device, in float64. VALUE, ADDRESS, BITS: the positions of its words."""
    number = tl.load(row + VALUE)
    address = tl.load(as_integers(row) + ADDRESS)
    if address != 0:
        if tl.load(as_integers(row) + BITS) == 32:
            number = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
        else:
            number = tl.load(address.to(tl.pointer_type(tl.float64)))
    return number


@triton.jit
def load_grad_scale(record):
    """Returns the number that all gradients of the step are divided by."""
    return load_scalar(
        record, word(_STEP, "grad_scale"), word(_STEP, "grad_scale_address"), word(_STEP, "grad_scale_bits")
    )


@triton.jit
def load_found_inf(record):
    """Returns a number that is not zero if the step is to be skipped."""
    return load_scalar(
        record, word(_STEP, "found_inf"), word(_STEP, "found_inf_address"), word(_STEP, "found_inf_bits")
    )


@triton.jit
def load_estimate(rows, e):
    """Returns estimate e, of the rows of all estimates. e: an index, or a block of them."""
    row = rows + e * _ESTIMATE_ROW_WORDS
    return Estimate(
        d=tl.load(row + word(_ESTIMATE, "d")),
        d_max=tl.load(row + word(_ESTIMATE, "d_max")),
        d_hat=tl.load(row + word(_ESTIMATE, "d_hat")),
        d_numerator=tl.load(row + word(_ESTIMATE, "d_numerator")),
        d_denom=tl.load(row + word(_ESTIMATE, "d_denom")),
        k=tl.load(row + word(_ESTIMATE, "k")),
        nonfinite_steps=tl.load(row + word(_ESTIMATE, "nonfinite_steps")),
        corrections=tl.load(row + word(_ESTIMATE, "corrections")),
    )


@triton.jit
def store_estimates(rows, e, new, mask):
    """Writes a block of estimates, those of the indices e, to the rows of all estimates."""
    row = rows + e * _ESTIMATE_ROW_WORDS
    tl.store(row + word(_ESTIMATE, "d"), new.d, mask)
    tl.store(row + word(_ESTIMATE, "d_max"), new.d_max, mask)
    tl.store(row + word(_ESTIMATE, "d_hat"), new.d_hat, mask)
    tl.store(row + word(_ESTIMATE, "d_numerator"), new.d_numerator, mask)
    tl.store(row + word(_ESTIMATE, "d_denom"), new.d_denom, mask)
    tl.store(row + word(_ESTIMATE, "k"), new.k, mask)
    tl.store(row + word(_ESTIMATE, "nonfinite_steps"), new.nonfinite_steps, mask)
    tl.store(row + word(_ESTIMATE, "corrections"), new.corrections, mask)


@triton.jit
def load_hyper(groups, group):
    """Returns the hyper-parameters of a group's update, of the rows of all groups."""
    row = groups + group * _GROUP_ROW_WORDS
    flags = as_integers(row)
    return Hyper(
        lr=load_scalar(row, word(_GROUP, "lr"), word(_GROUP, "lr_address"), word(_GROUP, "lr_bits")),
        beta1=tl.load(row + word(_GROUP, "beta1")),
        beta2=tl.load(row + word(_GROUP, "beta2")),
        eps=tl.load(row + word(_GROUP, "eps")),
        weight_decay=tl.load(row + word(_GROUP, "weight_decay")),
        decouple=tl.load(flags + word(_GROUP, "decouple")),
        use_bias_correction=tl.load(flags + word(_GROUP, "use_bias_correction")),
        safeguard_warmup=tl.load(flags + word(_GROUP, "safeguard_warmup")),
        maximize=tl.load(flags + word(_GROUP, "maximize")),
    )


@triton.jit
def load_options(groups, group):
    """Returns the options of a group's estimate, of the rows of all groups. Those of estimate e are in row e.

    group: an index, or a block of them.
    """
    row = groups + group * _GROUP_ROW_WORDS
    return EstimateOptions(
        d0=tl.load(row + word(_GROUP, "d0")),
        d_coef=tl.load(row + word(_GROUP, "d_coef")),
        growth_rate=tl.load(row + word(_GROUP, "growth_rate")),
        beta3=tl.load(row + word(_GROUP, "beta3")),
        d_limit=tl.load(row + word(_GROUP, "d_limit")),
        frozen=tl.load(as_integers(groups) + group * _GROUP_ROW_WORDS + word(_GROUP, "frozen")),
    )


@triton.jit
def load_estimate_index(groups, group):
    """Returns the index of a group's estimate, of the rows of all groups."""
    return tl.load(as_integers(groups) + group * _GROUP_ROW_WORDS + word(_GROUP, "estimate"))


@triton.jit
def load_group(tensors, index):
    """Returns the group of a tensor, of the rows of all tensors."""
    return tl.load(tensors + index * _TENSOR_ROW_WORDS + word(_TENSOR, "group"))


@triton.jit
def load_tensor(tensors, index):
    """Returns a tensor's fields, of the rows of all tensors."""
    row = tensors + index * _TENSOR_ROW_WORDS
    return Tensor(
        x=tl.load(row + word(_TENSOR, "x")),
        m=tl.load(row + word(_TENSOR, "m")),
        v=tl.load(row + word(_TENSOR, "v")),
        s=tl.load(row + word(_TENSOR, "s")),
        x0=tl.load(row + word(_TENSOR, "x0")),
        delta=tl.load(row + word(_TENSOR, "delta")),
        low=tl.load(row + word(_TENSOR, "low")),
        scale=tl.load(row + word(_TENSOR, "scale")),
        numel=tl.load(row + word(_TENSOR, "numel")),
        base=tl.load(row + word(_TENSOR, "base")),
        slice_p=tl.load(row + word(_TENSOR, "slice_p")),
        group=load_group(tensors, index),
        first_chunk=tl.load(row + word(_TENSOR, "first_chunk")),
        index=tl.load(row + word(_TENSOR, "index")).to(tl.uint32),
        stochastic=tl.load(row + word(_TENSOR, "stochastic")) != 0,
        dims=tl.load(row + word(_TENSOR, "dims")),
    )


@triton.jit
def order_of(tensors, index):
    """Returns a pointer to the strides of a tensor, of the rows of all tensors. See `load_strides`."""
    return tensors + index * _TENSOR_ROW_WORDS + _ORDER_WORD


@triton.jit
def load_strides(order, k):
    """Returns the stride and the row-major stride of a tensor's k-th dimension, from the outermost inwards."""
    return tl.load(order + k), tl.load(order + _MAX_DIMS + k)


@triton.jit
def load_gradient(grads, index):
    """Returns the address and the type of a tensor's gradient, of the rows of all gradients."""
    row = grads + index * _GRADIENT_ROW_WORDS
    return Gradient(address=tl.load(row + word(_GRADIENT, "address")), bits=tl.load(row + word(_GRADIENT, "bits")))
