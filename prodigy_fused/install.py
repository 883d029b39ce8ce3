"""``prodigy_fused.install()``: from then on ``import prodigyopt`` gives ``prodigy_fused.Prodigy``.

Note [The stand-in is a folder]
stand_in/package holds a package named prodigyopt, which is found by way of ``sys.path`` and not by an import hook: the
processes that multiprocessing spawns have the same ``sys.path``, and others can be given it by ``PYTHONPATH``. In this
process the package is imported at once, so that no other folder in ``sys.path`` comes first.
"""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from .prodigy import Prodigy

NAME = "prodigyopt"
_STAND_IN = Path(__file__).with_name("stand_in")
PACKAGE = str(_STAND_IN / "package")
METADATA = str(_STAND_IN / "metadata")
"""What ``importlib.metadata`` is to find, where prodigyopt is not installed."""

_replaced: list[tuple[ModuleType, type]] = []
"""The modules of prodigyopt itself that have been given our class, and their own."""


def install() -> None:
    """Makes ``import prodigyopt`` give ``prodigy_fused.Prodigy``, in every way of importing, installed or not.

    In this process and in those that multiprocessing starts. Call it before the code that imports prodigyopt. If
    prodigyopt has been imported, its module is given our class in the place of its own, but a module that did ``from
    prodigyopt import Prodigy`` before keeps prodigyopt's, as do subclasses and optimizers that exist; a warning names
    them. A second call does nothing.

    Warns:
        UserWarning: modules that keep prodigyopt's class, with their names.
    """
    for folder in folders():
        if folder not in sys.path:
            sys.path.insert(1, folder)  # the first is the script's own folder, which scripts may rely on
    if sys.modules.get(NAME) is None:
        _import_stand_in()
    theirs: set[type] = set()
    for module in _modules():
        present = vars(module).get("Prodigy")
        if isinstance(present, type) and present is not Prodigy:
            _replaced.append((module, present))
            vars(module)["Prodigy"] = Prodigy
            theirs.add(present)
    if left := _keepers(theirs):
        warnings.warn(
            f"prodigyopt's own Prodigy stays in use where it was imported before prodigy_fused.install(): {left}. "
            "Call install() first, or start the script by python -m prodigy_fused run",
            stacklevel=2,
        )


def uninstall() -> None:
    """Takes :func:`install` back: ``import prodigyopt`` gives prodigyopt's, or fails where that is not installed.

    Names that were imported meanwhile stay ours.
    """
    while _replaced:
        module, theirs = _replaced.pop()
        vars(module)["Prodigy"] = theirs
    if getattr(sys.modules.get(NAME), "__file__", "").startswith(PACKAGE):
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry not in (PACKAGE, METADATA)]


def folders() -> list[str]:
    """Returns what has to be in ``sys.path`` of a process, or in ``PYTHONPATH``."""
    try:
        metadata.version(NAME)
    except metadata.PackageNotFoundError:
        return [METADATA, PACKAGE]
    return [METADATA, PACKAGE] if METADATA in sys.path else [PACKAGE]


def _import_stand_in() -> None:
    spec = PathFinder.find_spec(NAME, [PACKAGE])
    assert spec is not None and spec.loader is not None, f"{PACKAGE} is missing: reinstall prodigy-fused"
    sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


def _modules() -> list[ModuleType]:
    """Returns the modules that are to have our class."""
    found = (sys.modules.get(name) for name in (NAME, f"{NAME}.prodigy"))
    return [module for module in found if module is not None]


def _keepers(theirs: set[type]) -> str:
    """Returns the names of modules and subclasses that keep a class of ``theirs``, "" if there are none."""
    subclasses: list[type] = []
    for cls in theirs:
        subclasses += cls.__subclasses__()
    found = {f"{cls.__module__}.{cls.__qualname__}" for cls in subclasses}
    identities = {id(cls) for cls in theirs}
    for name, module in list(sys.modules.items()):
        if any(id(value) in identities for value in list(getattr(module, "__dict__", {}).values())):
            found.add(name)
    return ", ".join(sorted(found))
