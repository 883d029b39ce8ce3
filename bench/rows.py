"""Results: a CSV row per measurement, with everything needed to compare it with another. Files are only appended to."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from shared import machine

Row = dict[str, Any]
WHERE = ("run", "date", "commit", "version", "torch", "python", "device", "cpu", "threads", "cuda", "driver", "mode")
WHAT = ("kind", "workload", "tensors", "parameters", "dtype", "heat", "peer", "package", "slice_p", "status", "reason")
FIGURES = (
    "rounds", "ms", "ms_25", "ms_75", "wall_ms", "host_ms", "launches", "syncs", "extra_bytes", "state_bytes", "bytes",
    "copy_gb_s", "in_place_gb_s", "train_ms", "tokens_per_s", "moves", "kernel_us",
)  # fmt: skip
FIELDS = (*WHERE, *WHAT, *FIGURES)
COUNTS = (
    "threads", "tensors", "parameters", "heat", "slice_p", "rounds", "launches", "syncs", "extra_bytes", "moves",
)  # fmt: skip
# Parameters from which on no current machine keeps a step's tensors in its caches.
BEYOND_CACHE = 1 << 24


def environment(device: torch.device, mode: str) -> Row:
    """Returns the columns WHERE of all rows of a run: where and with what it measures."""
    facts, gpu = machine.describe(device), device.type == "cuda"
    cpu = f"{facts['cores']} x {facts['cpu']}"
    return {
        "run": f"{facts['date']} {facts['commit']}",
        "date": facts["date"][:10],
        "commit": facts["commit"],
        "version": facts["prodigy-fused"],
        "torch": facts["torch"],
        "python": facts["python"],
        "device": facts["gpu"] if gpu else cpu,
        "cpu": cpu,
        "threads": facts["threads"],
        "cuda": facts["cuda"],
        "driver": facts["driver"],
        "mode": mode,
    }


def plot_stem(row: Row) -> str:
    """Returns the beginning of the file names of a machine's plots, for the row's dtype."""
    stem = "".join(c if c.isalnum() else "-" for c in row["device"])
    return stem if row["dtype"] == "float32" else f"{stem}-{row['dtype']}"


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
    """Returns the path of a file of results that was given as an argument of a command.

    Raises:
        argparse.ArgumentTypeError: there is no such file, or it is not one of results.
    """
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
    """Returns all rows of a file, figures as numbers, None for a missing one."""
    with path.open(newline="") as file:
        return [_typed(row) for row in csv.DictReader(file)]


def _typed(row: dict[str, str]) -> Row:
    typed: Row = dict(row)
    for name in (*FIGURES, *COUNTS):
        typed[name] = None if row[name] == "" else int(row[name]) if name in COUNTS else float(row[name])
    return typed


def latest(rows: list[Row]) -> list[Row]:
    """Returns the rows of the last run of each workload, on each device and in each dtype."""
    key = itemgetter("device", "dtype", "kind", "workload")
    last = {key(row): row["run"] for row in rows}
    return [row for row in rows if last[key(row)] == row["run"]]


def ratio(row: Row, rows: list[Row], anchor: str) -> float | None:
    """Returns the time of a row relative to that of `anchor` in the same run, workload and heat; None without one."""
    same = ("run", "kind", "workload", "dtype", "heat")
    for other in rows:
        if other["peer"] == anchor and other["ms"] and row["ms"] and all(other[key] == row[key] for key in same):
            return row["ms"] / other["ms"]
    return None


def limit_gb_s(row: Row) -> float:
    """Returns the bandwidth that is the limit: of the copy, or of work in place where that is faster (CPUs)."""
    return max(row["copy_gb_s"] or 0, row["in_place_gb_s"] or 0)


def share(row: Row, gb_s: float | None) -> float | None:
    """Returns the bytes that a step must move, over its time, relative to a bandwidth; None if one is not known."""
    if not (row["bytes"] and row["ms"] and gb_s):
        return None
    return row["bytes"] * row["parameters"] / row["ms"] / 1e6 / gb_s
