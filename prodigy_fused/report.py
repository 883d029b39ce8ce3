"""The report of ``python -m prodigy_fused``: versions, devices, and what would be chosen on each of them and why."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata

import torch

from . import __version__, backends
from .backends import native
from .low_precision import mode_of
from .options import Group
from .prodigy import Prodigy
from .state import state_format

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHY_ROUNDED = {
    "stochastic": "16 bits are too coarse for a step: x is rounded at random, exact on average",
    "24bit": "16 bits are too coarse for a step: 8 more bits of x are kept",
    "displacement": "16 bits are too coarse for a step: x - x0 is kept in float32",
}


def report() -> str:
    """Returns the report as text, one fact per line: what to paste into a bug report."""
    lines = _versions()
    for device in devices():
        lines.append("")
        try:
            lines += _device(device)
        except (AssertionError, RuntimeError) as error:  # a busy GPU, an old driver: the others are still of interest
            lines.append(f"{device!s:<6} cannot be used: {str(error).splitlines()[0]}")
    return "\n".join(lines)


def devices() -> list[torch.device]:
    """Returns the CPU and all GPUs."""
    gpus = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    return [torch.device("cpu"), *(torch.device(kind, i) for kind, count in gpus.items() for i in range(count))]


def _versions() -> list[str]:
    facts = {
        "prodigy_fused": __version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, built for {_toolkit()}",
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if not native.MISSING:
        from . import _C

        facts["compiled"] = f"instruction set {_C.instruction_set()}, threads of {_C.threading()}"
        facts["cuda"] = _C.CUDA or "left out of the compiled module"
    if torch.cuda.is_available():
        facts["driver"] = _driver()
    facts |= {package: _version(package) for package in ("triton", "numpy", "prodigyopt")}
    return [f"{name:<13} {value}" for name, value in facts.items()]


def _toolkit() -> str:
    """Returns what torch was built for, with the version of that runtime."""
    for name, kind in (("CUDA", "cuda"), ("ROCm", "hip"), ("XPU", "xpu")):
        if version := getattr(torch.version, kind, None):
            return f"{name} {version}"
    return "the CPU only"


def _driver() -> str:
    """Returns the version of NVIDIA's driver, of which torch does not tell."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown: no nvidia-smi"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return said[0] if said else "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device(device: torch.device) -> list[str]:
    """Returns a line per backend, whether it can be used, then one per dtype, what would be chosen."""
    params = [torch.zeros(1, device=device, dtype=dtype) for dtype in DTYPES]
    group = Prodigy(params, fused=False).param_groups[0]
    reasons = {name: backends.get(name).unsupported(params[0], group) for name in backends.names()}
    lines = [f"{device!s:<6} {_hardware(device)}"]
    lines += [f"{device!s:<6} {name:<9} {'yes' if why is None else f'no: {why}'}" for name, why in reasons.items()]
    return lines + [f"{device!s:<6} {_name(p.dtype):<9} -> {_choice(p, group)}" for p in params]


def _hardware(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    module = getattr(torch, device.type)
    properties = module.get_device_properties(device)
    capability = f", compute capability {properties.major}.{properties.minor}" if device.type == "cuda" else ""
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB{capability}"


def _choice(p: torch.Tensor, group: Group) -> str:
    """Returns what the defaults give for one parameter: backend, rounding, dtype of the state, each with its reason."""
    compiled = backends.compiled()
    try:  # as fused=None, which would warn
        backend, why = backends.choose(p, {**group, "fused": True}), f"the first of {', '.join(compiled)} that can"
    except RuntimeError as error:
        backend, why = "foreach", f"no compiled backend can ({str(error).partition(': ')[2]})"
    mode = mode_of(p, group)
    rounding = "x not rounded" if mode is None else f'low_precision "{mode}" ({WHY_ROUNDED[mode]})'
    return f"{backend} ({why}); state {state_format(p, group)}; {rounding}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
