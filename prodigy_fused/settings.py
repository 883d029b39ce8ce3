"""What a step reads from the groups: the options, which are checked where one was changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import backends, hyper, options
from .estimate import members
from .hyper import EstimateOptions, Hyper
from .options import OPTIONS, Group


class Settings:
    """The options of an optimizer's groups, as they were last read."""

    def __init__(self) -> None:
        self.hypers: list[Hyper] = []  # of each group; the same list as long as no number in it changes
        self.estimates: list[EstimateOptions] = []  # of each group's estimate
        self._known: list[tuple[Any, ...]] | None = None
        self._layouts: list[tuple[Any, ...]] = []

    def forget(self) -> None:
        """Has all options read and checked anew."""
        self._known = None

    def read(self, groups: list[Group]) -> bool:
        """Reads the numbers of the groups and of their estimates.

        Returns:
            Whether a change may have made plans of no more use.

        Raises:
            ValueError: a bad option, or a conflict between groups. The next call then checks all of them again.
        """
        found = list(map(hyper.settings_of, groups))
        if self._known is not None and hyper.identical(found, self._known):
            if not self._has_rates_of(groups):
                self.hypers = _hypers_of(groups)
            return False
        changed = self._changed(found)
        self._known = None
        for group, names in zip(groups, changed, strict=True):
            options.check(group, names)
            backends.check_choice(group)
        for own in members(groups):  # one of them may have been put back, or an interrupt may have come in between
            ended = any(group["frozen"] for group in own)
            for group in own:
                group["frozen"] = ended
        plain = list(map(options.stored, groups, changed))
        self.estimates = hyper.estimate_options_of([{**g, **p} for g, p in zip(groups, plain, strict=True)])
        for group, values in zip(groups, plain, strict=True):
            group.update(values)
        self.hypers = _hypers_of(groups)
        former, self._layouts = self._layouts, list(map(hyper.layout_of, groups))
        self._known = list(map(hyper.settings_of, groups))
        return self._layouts != former

    def _changed(self, found: list[tuple[Any, ...]]) -> list[Iterable[str]]:
        """Returns the options of each group that are to be checked: all, where it is not known which group it was."""
        if self._known is None or len(self._known) != len(found):
            return [OPTIONS] * len(found)
        return list(map(hyper.changed, found, self._known))

    def _has_rates_of(self, groups: list[Group]) -> bool:
        """Returns whether each ``lr`` is the very number that was read last. (One in a tensor may have changed.)"""
        return all(type(h.lr) is float and h.lr is group["lr"] for h, group in zip(self.hypers, groups, strict=True))


def _hypers_of(groups: list[Group]) -> list[Hyper]:
    hypers = list(map(hyper.hyper_of, groups))
    for group in groups:
        if type(group["lr"]) not in (float, int):  # as NumPy's, from a schedule
            group["lr"] = OPTIONS["lr"].stored(group["lr"])
    return hypers
