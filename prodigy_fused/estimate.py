"""The distance estimate ``d``: a row of float64 on the parameters' device, and the rule that advances it.

The groups of an optimizer share one estimate or, with ``split_groups``, each has its own. It is published in every
``param_group`` under the reference's keys (``d``, ``d_max``, ``d_numerator``, ...), and values that a user, a scheduler
or ``load_state_dict`` writes there enter the next step: the groups, not this module, own the numbers between steps.
"""

from __future__ import annotations

import math
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .hyper import EstimateOptions
from .options import Group, number, on_device
from .tensors import is_fake

FIELDS = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k", "nonfinite_steps", "corrections")
IN_REFERENCE = ("d", "d_max", "d_numerator", "k")  # the fields that prodigyopt.Prodigy 1.1.2 has in its groups
COUNTERS = frozenset({"k", "nonfinite_steps", "corrections"})
Published = dict[str, Any]


def initial(d0: float) -> dict[str, float]:
    """Returns the estimate before the first step."""
    start = dict.fromkeys(FIELDS, 0.0)
    start.update(d=d0, d_max=d0, d_hat=d0)
    return as_numbers(list(start.values()))


def as_numbers(values: list[float]) -> dict[str, float]:
    """Returns a row's values by name, counters as ``int``: the form that ``param_groups`` and checkpoints hold."""
    return {name: int(v) if name in COUNTERS else v for name, v in zip(FIELDS, values, strict=True)}


def check_value(name: str, value: Any) -> float:
    """Returns one field of the estimate that came from outside (user, scheduler, checkpoint) as a number.

    Raises:
        ValueError: it is not a number, or not one that the estimate could have reached; names it.
    """
    checked = number(value)
    least = 0.0 if name in COUNTERS or name == "d_denom" else -math.inf
    if not math.isfinite(checked) or checked < least or (name in ("d", "d_max") and checked <= 0):
        raise ValueError(f"the estimate is corrupt: {name} = {value!r}")
    return checked


def members(groups: list[Group]) -> list[list[Group]]:
    """Returns the groups of each estimate: all share one, or each has its own."""
    split = bool(groups) and groups[0]["split_groups"]
    return [[group] for group in groups] if split else [groups]


def changes(groups: list[Group], published: Published) -> Published:
    """Returns the values changed in the groups of an estimate since they were published: those that are not the
    published objects.

    Raises:
        ValueError: a value that the estimate cannot take; names it.
    """
    found: Published = {}
    for name in FIELDS:
        for group in groups:
            value = group[name]
            if name not in published or value is not published[name]:
                found[name] = _checked(name, value)
                break
    return found


def _checked(name: str, value: Any) -> Any:
    """Returns a value that was written to a group, checked, unless it is a number on a device, which would wait."""
    if on_device(value) and value.numel() == 1:
        return value
    checked = check_value(name, value)
    return value if isinstance(value, Tensor) else checked


def all_changes(groups: list[Group], before: Estimates | None) -> list[Published]:
    """Returns the values of each estimate that were written to its groups since they were published.

    A group that was put into ``param_groups`` since then, where it may have been before, has nothing to say: its
    numbers are old. (But group 0's count, as they do for the reference.)

    Args:
        before: as they were published; all values are taken for written if there are none, or so many no more.

    Raises:
        ValueError: a value that the estimate cannot take; names it.
    """
    estimates = members(groups)
    if before is None or len(before.published) != len(estimates):
        return [changes(own, {}) for own in estimates]
    if len(groups) != len(before.groups) or not all(map(is_, groups, before.groups)):
        known = set(map(id, before.groups))
        estimates = [[own[0], *(group for group in own[1:] if id(group) in known)] for own in estimates]
    return list(map(changes, estimates, before.published))


def same_changes(a: list[Published], b: list[Published]) -> bool:
    """Returns whether :func:`all_changes` has found the same twice: equal numbers, the same tensors."""
    return [*map(_comparable, a)] == [*map(_comparable, b)]


def _comparable(values: Published) -> dict[str, Any]:
    return {name: id(value) if isinstance(value, Tensor) else value for name, value in values.items()}


class Estimates:
    """The rows of all estimates, float64[E, 8] on ``device``, synchronised with the optimizer's ``param_groups``."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.rows = torch.zeros(count, len(FIELDS), dtype=torch.float64, device=device)
        self.published: list[Published] = [{} for _ in range(count)]
        self.groups: list[Group] = []  # to which they were published

    def pull(self, written: list[Published]) -> None:
        """Takes over the values that :func:`all_changes` has found."""
        # Where groups have changed places, some are views of each other's rows.
        own = [{n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()} for values in written]
        for row, values in zip(self.rows, own, strict=True):
            for name, value in values.items():
                row[FIELDS.index(name)] = value

    def publish(self, groups: list[Group], rows: Tensor) -> None:
        """Publishes new rows in ``groups``: Python numbers on the CPU, else 0-dim views (no wait until they are read).

        The next step writes to other rows, so a view that somebody keeps still shows what it was; not so in a captured
        CUDA graph, all of whose replays write to the same memory.
        """
        self.rows = rows
        if is_fake(rows):  # has no numbers: what is published stays
            return
        if rows.is_cpu:
            self.published = [as_numbers(row) for row in rows.tolist()]
        else:
            self.published = [dict(zip(FIELDS, row.unbind(), strict=True)) for row in rows]
        self.groups = list(groups)
        for own, published in zip(members(groups), self.published, strict=True):
            for group in own:
                group.update(published)


def advance(rows: Tensor, sums: Tensor, options: EstimateOptions) -> Tensor:
    """Computes new estimates (docs/algorithm.md, Algorithm 4, the lines from ``num`` to ``d_new``).

    Args:
        rows: float64[E, 8], the estimates before the step.
        sums: float64[E, 2], of each ``sum lr*bc*<g, x0 - x>`` and ``sum |s|`` over its parameters.
        options: the options that these estimates have in common.

    Returns:
        The rows after the step, a new tensor. No value is read by the host, so this runs on any device.
    """
    old = dict(zip(FIELDS, rows.unbind(1), strict=True))
    if options.frozen:
        return torch.stack([*(old | {"k": old["k"] + 1}).values()], 1)
    d, (dot, den) = old["d"], sums.unbind(1)
    num = options.beta3 * old["d_numerator"] + d / options.d0 * d * dot
    d_hat = options.d_coef * num / den
    d_max = torch.maximum(old["d_max"], d_hat)
    grown = torch.where(d == options.d0, torch.maximum(d, d_hat), d) * options.growth_rate
    d_new = torch.minimum(d_max, grown).clamp(max=options.d_limit)

    is_step = den != 0  # else no gradient has been non-zero yet
    # Non-finite entries count as zero in den, so before the first step only the other sum tells.
    finite = torch.where(is_step, torch.isfinite(d_hat) & torch.isfinite(den), torch.isfinite(dot))
    taken = [d_new, d_max, d_hat, num, den]
    new = [torch.where(is_step & finite, t, old[name]) for name, t in zip(FIELDS, taken, strict=False)]
    new.append(old["k"] + is_step)
    new.append(old["nonfinite_steps"] + ~finite)
    new.append(old["corrections"] + (new[0] != d))
    return torch.stack(new, 1)
