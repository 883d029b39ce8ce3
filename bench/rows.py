"""Results: a CSV row per measurement, with all it takes to compare it with another. Files are only appended to."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
WHERE = ("run", "date", "commit", "version", "torch", "python", "device", "cpu", "threads", "cuda", "driver", "mode")
WHAT = ("kind", "workload", "tensors", "parameters", "dtype", "heat", "peer", "package", "slice_p", "status", "reason")
FIGURES = (
    "rounds", "ms", "ms_25", "ms_75", "wall_ms", "host_ms", "launches", "syncs", "extra_bytes", "state_bytes", "bytes",
    "copy_gb_s", "in_place_gb_s", "train_ms", "tokens_per_s",
)  # fmt: skip
FIELDS = (*WHERE, *WHAT, *FIGURES)
COUNTS = ("threads", "tensors", "parameters", "heat", "slice_p", "rounds", "launches", "syncs", "extra_bytes")
# From here on no machine of today keeps a step's tensors in its caches.
BEYOND_CACHE = 1 << 24


def processor() -> str:
    """The model name of the CPU, as well as this system tells it."""
    # platform.processor() is empty or just "x86_64" on Linux.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:
        return ""


def version(package: str) -> str:
    """The installed version of a distribution, empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment(device: torch.device, mode: str) -> Row:
    """Where and with what a run measures."""
    now, cuda = datetime.datetime.now(), device.type == "cuda"
    cpu = f"{os.cpu_count()} x {processor()}"
    commit = _output("git", "describe", "--always", "--dirty", "--exclude=*")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else ""
    return {
        "run": f"{now:%Y-%m-%dT%H:%M:%S} {commit}",
        "date": f"{now:%Y-%m-%d}",
        "commit": commit,
        "version": version("prodigy-fused"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else "",
        "driver": driver,
        "mode": mode,
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, with a header if it is new; a missing figure is an empty field.

    Raises:
        ValueError: the file has other columns, or a row has one that is not in FIELDS.
    """
    new = not path.exists()
    if not new and not _has_our_columns(path):
        raise ValueError(f"{path} has other columns than this version writes: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def file(name: str) -> Path:
    """An argument of a command that is a file of results; anything else is refused in a line."""
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{name}: no such file")
    if not _has_our_columns(path):
        raise argparse.ArgumentTypeError(f"{name}: not a file of results, or one of another version")
    return path


def _has_our_columns(path: Path) -> bool:
    with path.open(errors="replace") as lines:
        return lines.readline().rstrip("\n").split(",") == list(FIELDS)


def read(path: Path) -> list[Row]:
    """All rows of a file, figures as numbers, None for a missing one."""
    with path.open(newline="") as file:
        return [_typed(row) for row in csv.DictReader(file)]


def _typed(row: dict[str, str]) -> Row:
    typed: Row = dict(row)
    for name in (*FIGURES, *COUNTS):
        typed[name] = None if row[name] == "" else int(row[name]) if name in COUNTS else float(row[name])
    return typed


def latest(rows: list[Row]) -> list[Row]:
    """Of each workload, on each device and in each dtype, the rows of the last run."""
    key = itemgetter("device", "dtype", "kind", "workload")
    last = {key(row): row["run"] for row in rows}
    return [row for row in rows if last[key(row)] == row["run"]]


def ratio(row: Row, rows: list[Row], anchor: str) -> float | None:
    """The time of a row to that of `anchor` in the same run, workload and heat."""
    same = ("run", "kind", "workload", "dtype", "heat")
    for other in rows:
        if other["peer"] == anchor and other["ms"] and row["ms"] and all(other[key] == row[key] for key in same):
            return row["ms"] / other["ms"]
    return None


def limit_gb_s(row: Row) -> float:
    """The bandwidth that nothing can beat: of the copy, or of scaling in place where that is faster (CPUs)."""
    return max(row["copy_gb_s"] or 0, row["in_place_gb_s"] or 0)


def share(row: Row, gb_s: float | None) -> float | None:
    """The bytes that a step must move, over its time, to a bandwidth; None where one of them is not known."""
    if not (row["bytes"] and row["ms"] and gb_s):
        return None
    return row["bytes"] * row["parameters"] / row["ms"] / 1e6 / gb_s
