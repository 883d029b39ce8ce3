"""A warning where the estimate has stood still for steps, because its sums were not finite."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from .dtensor import local
from .step import Slot
from .tensors import describe

WARN_AFTER_STEPS = 10  # without a finite one among them


class NonfiniteWatch:
    """Counts the steps in a row whose sums were not finite, of one estimate, and warns once."""

    def __init__(self) -> None:
        self._steps = self._nonfinite = self._in_a_row = 0
        self._warned = False

    def look(self, steps: int, nonfinite: int, slots: Sequence[Slot], estimate: int) -> None:
        """Takes note of ``k`` and ``nonfinite_steps``, after any number of steps since the last look.

        Warns if they stand for enough steps in a row, and names the parameter to blame of the estimate among ``slots``.
        """
        new, new_nonfinite = steps - self._steps, nonfinite - self._nonfinite
        self._steps, self._nonfinite = steps, nonfinite
        if new == new_nonfinite == 0:
            return
        # Before the first step counts, k stands still while nonfinite_steps grows.
        self._in_a_row = self._in_a_row + new_nonfinite if 0 < new_nonfinite >= new else 0
        if self._in_a_row >= WARN_AFTER_STEPS and not self._warned:
            self._warned = True
            what = _culprit([slot for slot in slots if slot.estimate == estimate])
            warnings.warn(
                f"the sums of the last {self._in_a_row} steps were not finite, so d stands still: {what}",
                stacklevel=2,
            )


def _culprit(slots: Sequence[Slot]) -> str:
    """Returns which parameter is to blame. (Where its gradient is 0, its value and its start may be infinite.)"""
    for what in ("gradient", "value", "start"):
        wrong = [slot for slot in slots if (grad := _gradient(slot)) is not None and not _is_finite(slot, grad, what)]
        if wrong:
            more = f" (and those of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            return f"the {what} of {describe(wrong[0].index, wrong[0].param)}{more} has entries that are not finite"
    return "the gradients were not finite, or the sums overflow"


def _gradient(slot: Slot) -> Tensor | None:
    grad = slot.parameter.grad
    fits = grad is not None and local(grad).shape == slot.param.shape  # else it is still to be redistributed
    return local(grad) if fits else None  # type: ignore[arg-type]


def _is_finite(slot: Slot, grad: Tensor, what: str) -> bool:
    g = slot.sampled(grad)  # what is not sampled is in no sum
    if what == "gradient":
        return bool(g.isfinite().all())
    t = slot.sampled(slot.param.detach()) if what == "value" else slot.state.get("p0")
    return t is None or bool((t.isfinite() | (g == 0)).all())
