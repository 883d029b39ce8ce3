"""Validation of parameters and gradients; all its error messages are here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from .dtensor import IndexMap, is_dtensor, is_partial, local, ready, samples_of
from .options import SIXTEEN_BIT

PARAMETER_DTYPES = (torch.float32, torch.float64, *SIXTEEN_BIT)


def is_fake(tensor: Tensor) -> bool:
    """Returns whether a tensor has no numbers, as under ``FakeTensorMode``."""
    return isinstance(tensor, FakeTensor)


def describe(index: int, tensor: Tensor) -> str:
    """Returns ``parameter 3 of shape (4, 5)``, for error messages."""
    return f"parameter {index} of shape {tuple(tensor.shape)}"


def may_overlap(tensor: Tensor) -> bool:
    """Returns whether two index tuples may share an address, as in an expanded tensor (its update is ill-defined)."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False


def is_dense(tensor: Tensor) -> bool:
    """Returns whether the elements fill one run of memory, with the dimensions in any order (channels_last)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def memory_order(t: Tensor) -> list[int]:
    """Returns the dimensions of a dense tensor from the outermost in memory inwards."""
    return sorted(range(t.dim()), key=lambda k: t.stride(k), reverse=True)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Returns whether element i of memory is the same element in both; strides of size-1 dimensions mean nothing."""
    pairs = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.shape == b.shape and (a.numel() == 0 or all(s == t for s, t, size in pairs if size > 1))


def sampled(t: Tensor, slice_p: int, where: IndexMap | None = None) -> Tensor:
    """Returns the elements of ``t`` that take part in the estimate: ``t`` itself, or a row-major sample of it; of a
    shard, those of the whole tensor's sample."""
    return t if slice_p == 1 else t.flatten()[samples_of(where, slice_p, t.device)]


def is_passenger(p: Tensor) -> bool:
    """Returns whether ``p`` is a frozen parameter that has no steps, for its dtype or because its class wraps other
    tensors, as the codes of a quantised model are, which come along where ``model.parameters()`` is given."""
    if p.requires_grad or not isinstance(p, torch.nn.Parameter):
        return False
    wraps = type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_dtensor(p) and not is_fake(p)
    return wraps or p.dtype not in PARAMETER_DTYPES


def check_parameter(index: int, p: Tensor) -> None:
    """Raises if ``p`` cannot be optimized.

    Raises:
        TypeError: a complex, integer or otherwise unsupported parameter, or a DTensor of terms of a sum.
        ValueError: a sparse, meta, overlapping (expanded) or negated parameter, or one without memory.
    """
    if is_lazy(p):
        return  # has no shape yet; checked again when its first gradient arrives
    what = describe(index, p)
    if is_dtensor(p):
        if is_partial(p):
            raise TypeError(f"{what} has partial values ({p.placements}): redistribute it")  # type: ignore[attr-defined]
        p = local(p)
    if p.layout != torch.strided:
        raise ValueError(f"{what} is sparse ({p.layout}): Prodigy needs dense parameters")
    if p.dtype not in PARAMETER_DTYPES:
        kind = "complex" if p.is_complex() else "not floating point" if not p.is_floating_point() else "unsupported"
        advice = ": keep real parameters, and torch.view_as_complex of them in forward()" if p.is_complex() else ""
        raise TypeError(f"{what} has dtype {p.dtype}, which is {kind}{advice}")
    if p.device.type == "meta":
        raise ValueError(f"{what} is on the meta device: materialise it first (for example module.to_empty)")
    if may_overlap(p):
        raise ValueError(f"{what} has elements that share memory (strides {p.stride()}): clone an expanded parameter")
    if p.is_neg():
        raise ValueError(f"{what} is a negated view of other memory (is_neg()): optimize resolve_neg() of it")
    check_memory(what, p)


class MemoryRuns:
    """Where parameters are in memory, to see whether two of them share some: a kernel that steps all in one pass would
    write to the first while it reads the second."""

    def __init__(self) -> None:
        self._params: dict[int, Tensor] = {}
        self._runs: list[tuple[int, int]] = []  # address and index, sorted

    def add(self, params: Mapping[int, Tensor]) -> None:
        """Adds parameters, by index.

        Raises:
            ValueError: two share memory; names both. The usual cause is ``load_state_dict(assign=True)``, which unties
                tied weights. This object is then of no more use.
        """
        self._params.update(params)
        new = [(p.data_ptr(), index) for index, p in params.items() if p.numel() > 0]
        if not self._runs:
            self._runs = sorted(new)
            self._check(self._runs)
            return
        for run in new:
            at = bisect_left(self._runs, run)
            self._runs.insert(at, run)
            self._check(self._runs[max(at - 1, 0) : at + 2])

    def _check(self, runs: list[tuple[int, int]]) -> None:
        for (begin, first), (following, second) in pairwise(runs):
            p, q = self._params[first], self._params[second]
            if following < begin + p.numel() * p.itemsize and p.device == q.device:
                raise ValueError(
                    f"{describe(first, p)} and {describe(second, q)} share memory: make them one parameter again "
                    "(load_state_dict(assign=True) unties tied weights), or use fused=False"
                )


def check_materialised(index: int, p: Tensor) -> None:
    """Raises ``ValueError`` if ``p`` still has no memory when a step is taken."""
    if p.is_meta and not is_lazy(p):
        raise ValueError(
            f"{describe(index, p)} is still on the meta device: the model was materialised into other tensors; "
            "construct the optimizer afterwards, or call torch.__future__."
            "set_swap_module_params_on_conversion(True) before the model is"
        )


def are_apart(params: list[Tensor]) -> bool:
    """Returns whether no two parameters share memory."""
    if any(map(is_fake, params)):
        return True
    try:
        MemoryRuns().add(dict(enumerate(params)))
    except ValueError:
        return False
    return True


def check_memory(what: str, t: Tensor) -> None:
    """Raises ``ValueError`` if the storage of ``t`` was freed, or it never had one."""
    if t.numel() > 0 and t.untyped_storage().nbytes() == 0:
        raise ValueError(f"{what} has no memory: its storage was freed, or it is a wrapper around other tensors")


def fits_dtype(grad: Tensor, p: Tensor) -> bool:
    """Returns whether a gradient of ``p`` may have the dtype of ``grad``."""
    return grad.dtype == p.dtype or (grad.dtype == torch.float32 and p.dtype in SIXTEEN_BIT)


def _is_plain(grad: Tensor, p: Tensor) -> bool:
    """Returns whether there is nothing to say about a gradient: the common case, for which there may be little time."""
    same = grad.dtype is p.dtype and grad.shape == p.shape and grad.device == p.device and grad.layout is torch.strided
    return same and type(grad) is Tensor and not is_dtensor(p) and grad.untyped_storage().nbytes() > 0


def check_gradient(index: int, p: Tensor, grad: Tensor) -> None:
    """Raises if ``grad`` is not a gradient of ``p``.

    Raises:
        RuntimeError: it is sparse.
        ValueError: of another shape or device, or neither of its dtype nor, for 16-bit parameters, float32.
    """
    if _is_plain(grad, p):
        return
    what = f"the gradient of {describe(index, p)}"
    if is_dtensor(grad) != is_dtensor(p):
        raise ValueError(f"{what} is {'a' if is_dtensor(grad) else 'no'} DTensor, unlike the parameter")
    if is_dtensor(p) and grad.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(f"{what} is on {grad.device_mesh}, the parameter on {p.device_mesh}")  # type: ignore[attr-defined]
    if grad.layout != torch.strided:
        raise RuntimeError(f"{what} is sparse ({grad.layout}): use a layer with sparse=False, or grad.to_dense()")
    for name in ("shape", "dtype", "device"):
        got, wanted = getattr(grad, name), getattr(p, name)
        if got != wanted and not (name == "dtype" and fits_dtype(grad, p)):
            raise ValueError(f"{what} has {name} {got}, the parameter {wanted}")
    check_memory(what, ready(local(grad)))
