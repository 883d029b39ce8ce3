"""A description of the machine and of the software that figures were measured with."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess


def processor():
    """Returns the model name of the CPU, as far as the system tells it."""
    # platform.processor() is empty or just "x86_64" on Linux.
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package):
    """Returns the installed version of a distribution, an empty string if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe(device):
    """Returns the facts that a figure measured on `device` depends on, by name; empty strings where there is none.

    Args:
        device: a `torch.device`, or its name. GPU, CUDA and driver are described for a CUDA device only.
    """
    import torch  # here, so that bench/gpu_check can say what is wrong where torch is missing

    device = torch.device(device)
    gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        # Without git, whoever has copied the tree says which it is.
        "commit": os.environ.get("PRODIGY_FUSED_COMMIT")
        or _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "prodigy-fused": version("prodigy-fused"),
        "prodigyopt": version("prodigyopt"),
        "device": str(device),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if gpu else "",
        "cuda": torch.version.cuda if gpu else "",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
    }


def _output(*command):
    """Returns the output of a command, an empty string where there is no such command."""
    folder = pathlib.Path(__file__).parent
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
    except FileNotFoundError:
        return ""
