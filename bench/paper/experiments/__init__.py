"""The experiments, a module each, whose name is the experiment's. The first line of its docstring is shown in the help.

A module has

- `PART`: "convex", what `make paper` runs without arguments, or "networks".
- `PACKAGES`: the distributions' import names that its data come from (`data.py`).
- `KEYS`: the columns that say what a run is (method, data set, seed, whatever is set); `NUMBERS`: those that it found.
- `runs(full)`: yields the runs, each a dictionary of `KEYS`; with `full`, as large as the paper's.
- `run(key)`: does one, in a process of its own with one thread, and returns a dictionary of `NUMBERS`: a float, an
  integer, or a list of floats (a curve). Same key, same numbers.
- `plot(rows)`: returns figures by the end of their file's name: "" is NAME.png, "-d" is NAME-d.png.
- `tables(rows)`: returns tables by title, each the header's cells followed by the lines' cells, all strings.
- `verdicts(rows)`: returns `report.Verdict`s: the paper's claims, and what the rows say about them.

A row is a dictionary of `KEYS`, `NUMBERS` and `store.ENVIRONMENT`, with numbers as numbers and curves as tuples. The
last three get all rows that there are: the runs of one value of `full`, and perhaps some of the other.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

Row = dict[str, Any]
PARTS = ("convex", "networks")


class Experiment(Protocol):
    """What a module of this folder has."""

    PART: str
    PACKAGES: tuple[str, ...]
    KEYS: tuple[str, ...]
    NUMBERS: tuple[str, ...]
    runs: Callable[[bool], Iterator[Row]]
    run: Callable[[Row], Row]
    plot: Callable[[list[Row]], dict[str, Any]]
    tables: Callable[[list[Row]], dict[str, list[list[str]]]]
    verdicts: Callable[[list[Row]], list[Any]]


def names() -> list[str]:
    """Returns the names of all experiments."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Returns the module of an experiment."""
    return importlib.import_module(f"{__name__}.{name}")
