"""The registry of backends, best first, and the choice among them."""

from __future__ import annotations

import warnings
from functools import cache

from torch import Tensor

from ..dtensor import IndexMap
from ..eight_bits import is_coded
from ..low_precision import check_mode, mode_of
from ..options import SIXTEEN_BIT, Group
from ..state import state_dtype
from ..step import Backend
from . import cpu, cuda, foreach, native, reference, triton

_BACKENDS: dict[str, Backend] = {}
_PROTOCOL = ("COMPILED", "ONE_PASS", "READS_DEVICE", "missing", "unsupported", "make_plan")
READ_ROWS = {"cpu", "cuda"}  # the backends that take shards with an affine map, see Note [Global index] in dtensor.py
READ_SHIFTS = READ_ROWS | {"triton", "foreach"}  # those that take shards of consecutive elements of the whole
# What a row takes in a plan's chunk list and its sums; and what is nothing to speak of.
_ROW_BYTES, _FEW_BYTES = 64, 1 << 20


def register(name: str, backend: Backend) -> None:
    """Adds a backend, behind those that are there, or replaces the one of that name.

    Raises:
        TypeError: it lacks a name of :class:`prodigy_fused.step.Backend`, or is a class and not an instance of one.
        ValueError: the name is empty.
    """
    if not name:
        raise ValueError("a backend needs a name")
    if isinstance(backend, type):
        raise TypeError(f"backend {name!r}: give an instance of {backend.__name__}, not the class")
    lacking = [wanted for wanted in _PROTOCOL if not hasattr(backend, wanted)]
    if lacking:
        raise TypeError(f"backend {name!r} lacks {lacking}")
    _BACKENDS[name] = backend


def unregister(name: str) -> None:
    """Removes a backend.

    Raises:
        KeyError: there is none of that name.
    """
    del _BACKENDS[name]


def names() -> tuple[str, ...]:
    """Returns the names of all backends, best first."""
    return tuple(_BACKENDS)


def get(name: str) -> Backend:
    """Returns the backend of a name.

    Raises:
        KeyError: there is none of that name.
    """
    return _BACKENDS[name]


def compiled() -> tuple[str, ...]:
    """Returns the names of the backends among which ``fused=True`` chooses, best first."""
    return tuple(name for name, backend in _BACKENDS.items() if backend.COMPILED)


register("cuda", cuda)
register("triton", triton)
register("cpu", cpu)
register("foreach", foreach)
register("reference", reference)


def check_choice(group: Group) -> None:
    """Checks that the options ``backend``, ``fused`` and ``foreach`` of a group do not contradict each other.

    Raises:
        ValueError: an unknown backend, or one that ``fused`` or ``foreach`` excludes.
    """
    backend, fused, foreach = group["backend"], group["fused"], group["foreach"]
    if backend is not None and not (isinstance(backend, str) and backend in _BACKENDS):
        raise ValueError(f"Invalid backend: {backend!r}: must be one of {names()} or None")
    if fused and foreach:
        raise ValueError("fused=True and foreach=True exclude each other")
    if backend is not None and fused is not None and fused != get(backend).COMPILED:
        raise ValueError(f"backend={backend!r} and fused={fused} contradict each other")
    if backend is not None and foreach is not None and foreach != (backend == "foreach"):
        raise ValueError(f"backend={backend!r} and foreach={foreach} contradict each other")


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def choose(p: Tensor, group: Group, where: IndexMap | None = None) -> str:
    """Returns the name of the backend for one parameter.

    ``backend=...`` and ``fused=True`` never fall back; ``fused=None`` takes the first compiled backend that can.

    Args:
        p: of a DTensor, this rank's tensor.
        where: the index map of a shard.

    Raises:
        RuntimeError: the requested one cannot take this parameter; gives the reason and the remedy.
        ValueError: no backend can keep it as the group wants.
    """
    check_mode(p, group)
    named = group["backend"]
    if named is None and group["fused"] is not True:
        if group["foreach"] is False:
            named = "reference"
        elif group["fused"] is False or group["foreach"]:
            named = _in_python(p, group, where)
    reasons = {name: _unfit(name, p, group, where) for name in ([named] if named is not None else compiled())}
    for name, reason in reasons.items():
        if reason is None:
            return name
    if named is None and group["fused"] is None:
        _say_what_is_missing(p, group)
        return _in_python(p, group, where)
    requested = "fused=True" if named is None else f"backend={named!r}"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{requested} cannot be used for a parameter of shape {tuple(p.shape)}: {why}")


def _unfit(name: str, p: Tensor, group: Group, where: IndexMap | None) -> str | None:
    """Returns why a backend cannot take a parameter; None if it can."""
    reason = get(name).unsupported(p, group)
    if reason is not None or where is None or name == "reference" or not _uses_indices(p, group):
        return reason
    readers = READ_SHIFTS if where.is_short_shift else READ_ROWS
    if is_coded(p, group):
        readers = READ_SHIFTS if where.is_shift else set()  # a block of codes has to be in one run
    if where.affine is not None and p.is_contiguous() and name in readers:
        return _too_many_rows(p, where.affine.length)
    return "it cannot tell the index in the whole tensor, by which samples and random bits go, of this shard's elements"


def _too_many_rows(p: Tensor, length: int) -> str | None:
    """Returns why kernels had better not walk a shard row by row; None if they may."""
    rows = -(-p.numel() // length)
    if rows * _ROW_BYTES <= p.nbytes + _FEW_BYTES:
        return None
    return f"a list of the {rows} rows of this shard would take more memory than the shard"


def _in_python(p: Tensor, group: Group, where: IndexMap | None) -> str:
    """Returns the best backend that takes a parameter whatever it is."""
    return "foreach" if _unfit("foreach", p, group, where) is None else "reference"


def _uses_indices(p: Tensor, group: Group) -> bool:
    """Returns whether a step of ``p`` depends on where its elements are in the whole tensor."""
    samples = group["slice_p"] > 1 and not group.get("frozen", False)
    if samples or is_coded(p, group):
        return samples
    return mode_of(p, group) in ("stochastic", "24bit") or state_dtype(p, group) in SIXTEEN_BIT


def _say_what_is_missing(p: Tensor, group: Group) -> None:
    """Warns, once, that something could be installed with which ``p`` would be stepped faster."""
    if native.unfit(p, group) is not None:
        return  # whatever were installed
    missing = [reason for name in compiled() if (reason := get(name).missing(p.device))]
    if missing:
        _say_once(f"prodigy_fused runs on its slower foreach backend: {missing[0]}")
