"""What the two backends in Python share: the values of one parameter's tensors in the precision of the arithmetic, and
how new values are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import coded_state
from ..hyper import Hyper
from ..inference import writable
from ..options import SIXTEEN_BIT
from ..rounding import fourth, kept_value, random_bits, second, stochastic, stochastic_24, third
from ..state import KEYS
from ..step import BucketKey, Slot
from ..tensors import check_gradient


class TensorPlan:
    """The part of :class:`prodigy_fused.step.Plan` that plans share which look at their tensors anew in every step."""

    def __init__(self, key: BucketKey, slots: Sequence[Slot], estimates: int) -> None:
        self.sums = torch.zeros(estimates, 2, dtype=torch.float64, device=slots[0].param.device)
        self.extend(slots)
        self._grads: Sequence[Tensor | None] = ()
        self._terms: Any = ()  # of the sums, in any order

    def unchanged(self) -> bool:
        return self._layouts == list(map(_layout, self.slots))

    def unchanged_at(self, at: int) -> bool:
        return self._layouts[at] == _layout(self.slots[at])

    def mend(self) -> bool:
        return False  # addresses are not looked at: what has changed is more

    def extend(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._layouts = list(map(_layout, slots))

    def load_gradients(self, grads: Sequence[Tensor | None]) -> None:
        for slot, grad in zip(self.slots, grads, strict=True):
            if grad is not None:
                check_gradient(slot.index, slot.param, grad)
        self._grads = grads

    def release_gradients(self) -> None:
        self._grads = ()

    def partials(self) -> Any:
        return self._terms

    def put_partials(self, partials: Any) -> None:
        self._terms = partials


def _layout(slot: Slot) -> tuple[Any, ...]:
    p, there = slot.param, [key in slot.state for key in KEYS]
    return p.shape, p.stride(), p.dtype, p.device, p.untyped_storage().nbytes() > 0, there


def arithmetic(p: Tensor) -> torch.dtype:
    """Returns the dtype that a step of ``p`` is computed in."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def bias_correction(h: Hyper, k: Any) -> Any:
    """Returns ``bc``, Adam's, of step ``k`` (a number or a tensor, 0 for the first)."""
    if not h.use_bias_correction:
        return 1.0
    return (1 - h.beta2 ** (k + 1)) ** 0.5 / (1 - h.beta1 ** (k + 1))


def finite_or_zero(t: Tensor) -> Tensor:
    """Returns the elements, with 0 in the place of infinities and NaN."""
    return t.nan_to_num(0.0, 0.0, 0.0)


def current_x(slot: Slot) -> Tensor:
    """Returns ``x``: the parameter itself if its dtype is that of the arithmetic, else a new tensor.

    Resets a displacement that no longer fits its parameter.
    """
    p = slot.param.detach()
    if slot.low_precision == "24bit":
        return kept_value(p, slot.state["low"])
    if slot.low_precision != "displacement":
        return p.to(arithmetic(p))
    x0: Tensor = slot.state["p0"].float()
    delta: Tensor = slot.state["delta"]
    delta.copy_(torch.where((x0 + delta).to(p.dtype) == p, delta, p.float() - x0))
    return x0 + delta


def apply_step(slot: Slot, step_of_x: Tensor, k: Any) -> None:
    """Subtracts a step, in the precision of the arithmetic, from ``x``; ``k``, a number or tensor, is for rounding."""
    if not slot.moves_in_codes:
        _subtract(slot, step_of_x, k)
        return
    before = current_x(slot).clone()
    _subtract(slot, step_of_x, k)
    moved = load_state(slot, "delta", before.dtype) + finite_or_zero(current_x(slot) - before)
    store_state(slot, "delta", moved, k)


def _subtract(slot: Slot, step_of_x: Tensor, k: Any) -> None:
    p = writable(slot.param)
    if slot.low_precision == "displacement":
        delta = slot.state["delta"]
        delta.sub_(step_of_x)
        p.copy_(slot.state["p0"].float() + delta)
    elif slot.low_precision == "24bit":
        bits = random_bits(p, k, slot.random_index, where=slot.random_where)
        x, low = stochastic_24(current_x(slot) - step_of_x, bits)
        p.copy_(x)
        slot.state["low"].copy_(low)
    elif slot.low_precision == "stochastic":
        bits = random_bits(p, k, slot.random_index, where=slot.random_where)
        p.copy_(stochastic(p.float() - step_of_x, p.dtype, bits))
    else:
        p.copy_(p.to(step_of_x.dtype) - step_of_x)


def load_state(slot: Slot, key: str, dtype: torch.dtype) -> Tensor:
    """Returns the numbers of a state tensor, which may be the tensor itself."""
    stored: Tensor = slot.state[key]
    if slot.has_codes_of(key):
        return coded_state.load(key, stored, slot.state["scale"])
    return stored.to(dtype)


_DRAWS = {"exp_avg_sq": second, "s": third, "delta": fourth}


def store_state(slot: Slot, key: str, value: Tensor, k: Any) -> None:
    """Stores a state tensor, whose ``value`` is in the precision of the arithmetic."""
    stored, coded = slot.state[key], slot.has_codes_of(key)
    if stored is value:
        return
    bits = None
    if key in _DRAWS and (coded or stored.dtype in SIXTEEN_BIT):
        bits = random_bits(slot.param, k, slot.random_index, where=slot.random_where)
        bits = _DRAWS[key](slot.sampled(bits) if key == "s" else bits)
    if coded:
        coded_state.store(key, stored, slot.state["scale"], value, bits)
        return
    stored.copy_(value if bits is None else stochastic(value, stored.dtype, bits))
