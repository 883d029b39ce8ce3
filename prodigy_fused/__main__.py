"""``python -m prodigy_fused``: prints the versions, and which backends can be used here and why others cannot."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import __version__, backends
from .backends import native
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
    reason = backends.get(name).unsupported(p, Prodigy([p]).param_groups[0])
    return "yes" if reason is None else f"no: {reason}"


def report() -> str:
    """Returns the report as text, one fact per line."""
    lines = [
        f"prodigy_fused {__version__}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        f"python        {platform.python_version()}, {platform.system()} {platform.machine()}",
    ]
    if not native.MISSING:
        from . import _C

        lines.append(f"compiled      instruction set {_C.instruction_set()}, threads of {_C.threading()}")
        lines.append(f"cuda          {_C.CUDA or 'left out of the compiled module'}")
    lines.append(f"triton        {_version('triton')}")
    for device in _devices():
        lines += [f"{device!s:<5} {name:<9} {_status(name, device)}" for name in backends.names()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
