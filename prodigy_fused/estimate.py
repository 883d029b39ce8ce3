"""The distance estimate ``d``: one row of float64 where the parameters live, and the rule that advances it.

The groups of an optimizer share the estimate. It is published in every ``param_group`` under the reference's keys
(``d``, ``d_max``, ``d_numerator``, ...), and whatever a user, a scheduler or ``load_state_dict`` writes there is
taken up at the next step: the groups, not this module, own the numbers between steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import hyper
from .hyper import Shared

FIELDS = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k", "nonfinite_steps", "corrections")
RUN = 1024  # elements that are summed in one go, and in their own precision
Published = dict[str, Any]
COUNTERS = frozenset({"k", "nonfinite_steps", "corrections"})


def initial(d0: float) -> dict[str, float]:
    """The estimate before the first step."""
    start = dict.fromkeys(FIELDS, 0.0)
    start.update(d=d0, d_max=d0, d_hat=d0)
    return as_numbers(list(start.values()))


def as_numbers(values: list[float]) -> dict[str, float]:
    """A row's values by name, counters as ``int``: what ``param_groups`` and checkpoints hold."""
    return {name: int(v) if name in COUNTERS else v for name, v in zip(FIELDS, values, strict=True)}


def check_value(name: str, value: Any) -> float:
    """One of the estimate's numbers, as somebody else wrote it.

    Raises:
        ValueError: it is not a number, or not one that the estimate could have reached; names it.
    """
    number = hyper.number(value)
    least = 0.0 if name in COUNTERS or name == "d_denom" else -math.inf
    if not math.isfinite(number) or number < least or (name in ("d", "d_max") and number <= 0):
        raise ValueError(f"the estimate is corrupt: {name} = {value!r}")
    return number


def changes(groups: list[dict[str, Any]], published: Published) -> Published:
    """What somebody else wrote into the groups: every value that is not the very object that was published.

    Raises:
        ValueError: a value that the estimate cannot take; names it.
    """
    found: Published = {}
    for name in FIELDS:
        for group in groups:
            value = group[name]
            if name not in published or value is not published[name]:
                found[name] = value if isinstance(value, Tensor) else check_value(name, value)
                break
    return found


class Estimate:
    """The row, float64[8] on ``device``, kept in step with the optimizer's ``param_groups``."""

    def __init__(self, device: torch.device) -> None:
        self.row = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        self.published: Published = {}

    def pull(self, groups: list[dict[str, Any]]) -> None:
        """Takes up every value that is not the object :meth:`publish` left in the groups (the first, if several)."""
        for name, value in changes(groups, self.published).items():
            self.row[FIELDS.index(name)] = value

    def publish(self, groups: list[dict[str, Any]]) -> None:
        """Shows the row in ``groups``: numbers on the CPU; elsewhere 0-dim views, read when somebody looks.

        What they show is what the last step left: a copy of every step's would be one launch more.
        """
        if self.row.device.type == "cpu":
            self.published = as_numbers(self.row.tolist())
        else:
            self.published = dict(zip(FIELDS, self.row.unbind(), strict=True))
        for group in groups:
            group.update(self.published)


def stable_sum(t: Tensor) -> Tensor:
    """The sum of all elements, float64, in an order that does not depend on the number of threads.

    torch splits a long reduction to one number among its threads, but not one to many numbers. Only sums of runs are
    made in float64: asked for it at once, torch would make a copy of all elements in float64 first.
    """
    while t.numel() > RUN:
        t = t.flatten()
        whole = t.numel() // RUN * RUN
        t = torch.cat([t[:whole].view(-1, RUN).sum(1).double(), t[whole:].sum(dtype=torch.float64)[None]])
    return t.sum(dtype=torch.float64)


def advance(row: Tensor, sums: Tensor, shared: Shared) -> Tensor:
    """Phase 2, the rule for ``d`` (ALGORITHM.md, Algorithm 4, the lines from ``num`` to ``d_new``).

    Args:
        row: float64[8], the estimate before the step.
        sums: float64[2], ``sum lr*bc*<g, x0 - x>`` and ``sum |s|`` over all parameters.
        shared: the hyper-parameters of the estimate.

    Returns:
        The row after the step, a new tensor. No value is read by the host, so this runs on any device.
    """
    old = dict(zip(FIELDS, row, strict=True))
    d, den = old["d"], sums[1]
    num = shared.beta3 * old["d_numerator"] + d / shared.d0 * d * sums[0]
    d_hat = shared.d_coef * num / den
    d_max = torch.maximum(old["d_max"], d_hat)
    grown = torch.where(d == shared.d0, torch.maximum(d, d_hat), d) * shared.growth_rate
    d_new = torch.minimum(d_max, grown)

    counts = den != 0  # no gradient has been non-zero yet: not a step
    # Non-finite entries count as zero in den, so before the first step only the other sum tells.
    finite = torch.where(counts, torch.isfinite(d_hat) & torch.isfinite(den), torch.isfinite(sums[0]))
    taken = [d_new, d_max, d_hat, num, den]
    new = [torch.where(counts & finite, t, old[name]) for name, t in zip(FIELDS, taken, strict=False)]
    new.append(old["k"] + counts)
    new.append(old["nonfinite_steps"] + ~finite)
    new.append(old["corrections"] + (new[0] != d))
    return torch.stack(new)
