"""``python -m prodigy_fused``: what is installed here, which backends there are, and why others are not."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import __version__, backends
from .prodigy import Prodigy


def _devices() -> list[torch.device]:
    gpus = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    return [torch.device("cpu"), *(torch.device(kind, i) for kind, count in gpus.items() for i in range(count))]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _status(name: str, device: torch.device) -> str:
    p = torch.zeros(1, device=device)
    reason = backends.load(name).unsupported(p, Prodigy([p]).param_groups[0])
    return "yes" if reason is None else f"no: {reason}"


def report() -> str:
    """The report as text, a line a fact."""
    lines = [
        f"prodigy_fused {__version__}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        f"python        {platform.python_version()}, {platform.system()} {platform.machine()}",
    ]
    if not backends.load("cpu").MISSING:
        from . import _C

        lines.append(f"compiled      instruction set {_C.instruction_set()}, threads of {_C.threading()}")
        lines.append(f"cuda          {_C.CUDA or 'left out of the compiled module'}")
    lines.append(f"triton        {_version('triton')}")
    for device in _devices():
        lines += [f"{device!s:<5} {name:<9} {_status(name, device)}" for name in backends.NAMES]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
