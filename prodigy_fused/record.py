"""Packs the numbers of a step into words of 8 bytes, which the kernels in C++, CUDA and Triton read as they are.

The record of a step is one STEP row, then one GROUP row per parameter group; each row is a multiple of 16 bytes. The
names of the words come from the fields of the tuples in hyper.py. ``csrc/prodigy/record.h`` and
``triton_kernels/tables.py`` have the same names in the same order, and this is checked when a backend is imported.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import get_type_hints

from torch import Tensor

from .hyper import EstimateOptions, Hyper
from .options import Scalar

_HINTS = {**get_type_hints(Hyper), **get_type_hints(EstimateOptions)}
FLAGS = tuple(name for name, kind in _HINTS.items() if kind is bool)


def _scalar_fields(name: str) -> tuple[str, str, str]:
    return name, f"{name}_address", f"{name}_bits"


STEP_FIELDS = (*_scalar_fields("grad_scale"), *_scalar_fields("found_inf"))
# The options of estimate e are those in row e: groups that share the estimate 0 have the same.
GROUP_FIELDS = (*Hyper._fields, *EstimateOptions._fields, "estimate", *_scalar_fields("lr")[1:])


def _row(fields: Sequence[str]) -> struct.Struct:
    codes = {"address": "Q", "bits": "q", "estimate": "q"}
    words = ["q" if name in FLAGS else codes.get(name.rpartition("_")[2], "d") for name in fields]
    return struct.Struct("=" + "".join(words) + "8x" * (len(words) % 2))


STEP, GROUP = _row(STEP_FIELDS), _row(GROUP_FIELDS)


def pack(
    hypers: Sequence[Hyper],
    estimates: Sequence[EstimateOptions],
    owners: Sequence[int],
    grad_scale: Scalar,
    found_inf: Scalar,
) -> bytes:
    """Returns the record of a step. Tensors among the numbers must outlive the kernels that read the record.

    Args:
        hypers, estimates, owners: of each group its numbers, its estimate's options, and the index of that estimate.

    Raises:
        ValueError: a tensor that kernels cannot read: not float32 or float64, or not one element; names the scalar.
    """
    step = STEP.pack(*scalar_words("grad_scale", grad_scale), *scalar_words("found_inf", found_inf))
    return b"".join([step, *map(_pack_group, hypers, estimates, owners)])


def _pack_group(h: Hyper, options: EstimateOptions, estimate: int) -> bytes:
    lr, address, bits = scalar_words("lr", h.lr)
    return GROUP.pack(lr, *h[1:], *options, estimate, address, bits)


def scalar_words(name: str, value: Scalar) -> tuple[float, int, int]:
    """Returns a scalar's words: its value, or the address and the bits of the number on the device.

    Raises:
        ValueError: a tensor that kernels cannot read: not float32 or float64, or not one element.
    """
    if not isinstance(value, Tensor):
        return value, 0, 0
    if value.numel() != 1 or value.element_size() not in (4, 8) or not value.is_floating_point():
        raise ValueError(f"{name} must be a number or a float32 or float64 tensor with one element")
    return 0.0, value.data_ptr(), 8 * value.element_size()
