"""The hyper-parameters of one step: the numbers of each group's update, and those of the estimates' updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from . import options
from .options import LAYOUT, OPTIONS, SETTINGS, Group, Scalar, check_lr

# Which all groups must have alike, also those with estimates of their own; and which only those that share one.
COMMON = ("split_groups",)
SHARED = ("prodigy_steps", *(name for name, option in OPTIONS.items() if option.role == "estimate"))


class Hyper(NamedTuple):
    """One group's numbers of one step: the options of role "rule"."""

    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decouple: bool
    use_bias_correction: bool
    safeguard_warmup: bool
    maximize: bool


class EstimateOptions(NamedTuple):
    """The numbers of an estimate's update; groups that share one ``d`` must agree on them."""

    d0: float
    d_coef: float
    growth_rate: float
    beta3: float
    d_limit: float
    frozen: bool  # d stays as it is, and needs no samples any more


def hyper_of(group: Group) -> Hyper:
    """Returns a group's numbers as they are now (schedulers write to the group between steps).

    Raises:
        ValueError: ``lr`` is on the host, and negative or not finite.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return Hyper(
        lr if options.on_device(lr) else check_lr(group),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        group["decouple"],
        group["use_bias_correction"],
        group["safeguard_warmup"],
        group["maximize"],
    )


def settings_of(group: Group) -> tuple[Any, ...]:
    """Returns the very objects of all options but ``lr``, to notice a change between steps; each of the betas, which
    may be in a list."""
    betas = group["betas"]
    return (*(betas if isinstance(betas, (tuple, list)) else [betas]), *map(group.__getitem__, SETTINGS))


def layout_of(group: Group) -> tuple[Any, ...]:
    """Returns what decides the shapes of the state and the choice of the backend."""
    return (group["betas"][0] > 0, group.get("frozen", False), *map(group.__getitem__, LAYOUT))


def beta3_of(group: Group) -> float:
    """Returns the decay of ``s`` and of the numerator: ``sqrt(beta2)`` unless given."""
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else float(group["beta3"])


def estimate_options_of(groups: list[Group]) -> list[EstimateOptions]:
    """Returns the estimate's options of every group.

    Raises:
        ValueError: two groups that share an estimate disagree on one of them; names the option and both groups.
    """
    for i, group in enumerate(groups):
        check_shared(groups[0], i, group)
    return list(map(_estimate_options, groups))


def check_shared(first: Group, index: int, group: Group) -> None:
    """Raises ``ValueError`` if ``group``, whose index is given, disagrees with group 0."""
    for name in COMMON:
        if first[name] != group[name]:
            raise ValueError(f"parameter groups 0 and {index} disagree on {name}: all groups have it, or none")
    if group["split_groups"]:
        return
    ours, theirs = ((*_estimate_options(each), each["prodigy_steps"]) for each in (first, group))
    for name, a, b in zip((*EstimateOptions._fields, "prodigy_steps"), ours, theirs, strict=True):
        if a != b:
            defaulted = name == "beta3" and group["beta3"] is None
            advice = " (beta3 defaults to sqrt(beta2): give beta3 explicitly)" if defaulted else ""
            raise ValueError(
                f"parameter groups 0 and {index} disagree on {name} ({a} and {b}), "
                f"but groups that share one estimate d must share it{advice}"
            )


def _estimate_options(group: Group) -> EstimateOptions:
    return EstimateOptions(
        float(group["d0"]),
        float(group["d_coef"]),
        float(group["growth_rate"]),
        beta3_of(group),
        float(group["d_limit"]),
        bool(group.get("frozen", False)),
    )


def changed(found: tuple[Any, ...], known: tuple[Any, ...]) -> Iterable[str]:
    """Returns the options that are other objects in one result of :func:`settings_of` than in another."""
    betas = len(found) - len(SETTINGS)
    if len(found) != len(known):
        return OPTIONS
    pairs = zip(("betas",) * betas + SETTINGS, found, known, strict=True)
    return dict.fromkeys(name for name, a, b in pairs if a is not b)


def identical(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> bool:
    """Returns whether both hold the very same objects: options are stored as immutable ones."""
    same_lengths = list(map(len, a)) == list(map(len, b))
    return same_lengths and all(map(is_, chain.from_iterable(a), chain.from_iterable(b)))
