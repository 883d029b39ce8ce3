"""``python -m prodigy_fused run``: an unchanged script, for which prodigyopt is ``prodigy_fused``."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from .install import folders, install

USAGE = "python -m prodigy_fused run script.py [its arguments], or run -m module [its arguments]"
PACKAGE = Path(__file__).parent


def run(arguments: Sequence[str]) -> None:
    """Runs a script or a module as ``__main__``, as python would, after :func:`prodigy_fused.install`.

    Args:
        arguments: ``[script, ...]`` or ``["-m", module, ...]``; what follows is the script's ``sys.argv[1:]``.

    Raises:
        SystemExit: the script's own; or status 2, after one line to stderr, if there is nothing to run.
    """
    by_name = list(arguments[:1]) == ["-m"]
    target, *rest = (arguments[1:] if by_name else arguments) or [""]
    if not target:
        fail("no module given" if by_name else "no script given")
    if target.startswith("-"):
        fail(f"{target} is neither a script nor -m")
    if not by_name and not os.path.exists(target):
        fail(f"there is no file {target}")
    if not by_name:
        _start_path_at(target)
    install()
    _hand_down(folders())
    _hide_our_frames()
    sys.argv[:] = [target, *rest]
    if by_name:
        _run_module(target)
    elif _is_application(target):
        runpy.run_path(target, run_name="__main__")
    else:
        _run_script(target)


def fail(what: str) -> NoReturn:
    """Ends the process with status 2, as python does that cannot find its script."""
    print(f"prodigy_fused run: {what} (usage: {USAGE})", file=sys.stderr)
    raise SystemExit(2)


def _is_application(path: str) -> bool:
    """Returns whether ``path`` is a folder or an archive, of which python runs the file ``__main__.py``."""
    return os.path.isdir(path) or zipfile.is_zipfile(path)


def _start_path_at(script: str) -> None:
    """Gives ``sys.path`` the first entry that python would give it for a script, in the place of that for ``-m``."""
    if getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        return
    sys.path[0] = script if _is_application(script) else os.path.dirname(os.path.realpath(script))
    if not any(finder.find_spec(PACKAGE.name, None) for finder in sys.meta_path):
        sys.path.append(str(PACKAGE.parent))  # python was started in a checkout that is not installed
        _hand_down([str(PACKAGE.parent)])


def _hand_down(entries: list[str]) -> None:
    """Puts ``entries`` first in the ``sys.path`` of every python that the script starts."""
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    new = [entry for entry in entries if entry not in inherited]
    os.environ["PYTHONPATH"] = os.pathsep.join([*new, *inherited])


def _run_script(script: str) -> None:
    path = os.path.abspath(script)
    names = {"__file__": path, "__loader__": SourceFileLoader("__main__", path), "__cached__": None}
    with io.open_code(path) as file:
        source = file.read()
    _execute(lambda: compile(source, path, "exec", dont_inherit=True), names)


def _run_module(name: str) -> None:
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:  # of a package that should contain it
        fail(f"there is no module {error.name}")
    loader: Any = spec and spec.loader
    if spec is None or not hasattr(loader, "get_code"):
        fail(f"there is no module {name} that can be run")
    names = {"__file__": spec.origin, "__loader__": loader, "__spec__": spec, "__package__": spec.parent}
    sys.argv[0] = spec.origin or name
    _execute(lambda: loader.get_code(spec.name), {**names, "__cached__": spec.cached})


def _execute(code: Callable[[], CodeType], names: dict[str, Any]) -> None:
    """Runs some code in a new module ``__main__``, which stays: threads and pickle look at it after the last line."""
    main = ModuleType("__main__")
    vars(main).update(names, __builtins__=builtins)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # the latter is what a spawned process calls it
    exec(code(), vars(main))


def _hide_our_frames() -> None:
    """Has tracebacks begin where the script does."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        frames: list[TracebackType] = []
        while traceback is not None:
            frames.append(traceback)
            traceback = traceback.tb_next
        ours = [i for i, entry in enumerate(frames) if entry.tb_frame.f_code.co_filename == __file__]
        rest = frames[ours[-1] + 1 :] if ours else frames
        first = rest[0] if rest else None
        previous(kind, error.with_traceback(first), first)

    sys.excepthook = hook
