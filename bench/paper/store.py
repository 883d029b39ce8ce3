"""Rows of the experiments: a CSV file each, a row per run, written when the run ends, so that what was done once is
not done again: a killed `make paper` goes on where it was."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from shared import ROOT, machine

Row = dict[str, Any]
# Of every row: what it took, where and when it was found.
ENVIRONMENT = ("seconds", "commit", "date", "machine", "torch")


class Store:
    """The rows of an experiment.

    Args:
        path: the file; its folder and it are created with the first row.
        keys: the columns that say what a run is. Runs with the same keys are the same run.
        numbers: the columns of what it found.

    Raises:
        ValueError: the file has other columns: it was written by another version of the experiment.
    """

    def __init__(self, path: Path, keys: Iterable[str], numbers: Iterable[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        self.fields = (*self.keys, *numbers, *ENVIRONMENT)
        self.rows = self._read() if path.exists() else []
        self._done = {self.identity(row) for row in self.rows}

    def done(self, key: Row) -> bool:
        """Returns whether there is a row of this run."""
        return self.identity(key) in self._done

    def append(self, row: Row) -> None:
        """Adds a row, here and in the file.

        Raises:
            ValueError: the row has other columns.
        """
        if set(row) != set(self.fields):
            raise ValueError(f"{self.path.name} has columns {self.fields}, the row {tuple(row)}")
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self.fields)
            writer.writerow([_text(row[name]) for name in self.fields])
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(_typed({name: _text(row[name]) for name in self.fields}))
        self._done.add(self.identity(row))

    def identity(self, row: Row) -> tuple[str, ...]:
        """Returns the keys of a run as they are in the file."""
        return tuple(_text(row[name]) for name in self.keys)

    def _read(self) -> list[Row]:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]  # without a row that was cut off when its process was killed
        if not whole:
            self.path.unlink()
            return []
        if whole.partition("\n")[0].split(",") != list(self.fields):
            raise ValueError(f"{self.path} has other columns than its experiment: remove it, and run that anew")
        if whole != text:
            self.path.write_text(whole)
        return [_typed(row) for row in csv.DictReader(whole.splitlines())]


def _typed(row: dict[str, str]) -> Row:
    """Returns numbers as numbers; a commit stays text, though it may look like one."""
    return {name: text if name in ENVIRONMENT[1:] else _value(text) for name, text in row.items()}


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(f"{number:.4g}" for number in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    try:
        return tuple(map(float, text.split())) or text
    except ValueError:
        return text


def environment() -> Row:
    """Returns the columns of ENVIRONMENT, but for the seconds."""
    facts = machine.describe("cpu")
    where = f"{facts['cores']} x {facts['cpu']}"
    commit = facts["commit"]
    if commit.endswith("-dirty") and _only_results_differ():
        commit = commit.removesuffix("-dirty")
    return {"commit": commit, "date": facts["date"][:10], "machine": where, "torch": facts["torch"]}


def _only_results_differ() -> bool:
    """Returns whether nothing differs from the commit but rows, which a run that goes on has written itself."""
    command = ("git", "diff", "--quiet", "HEAD", "--", ".", ":!bench/results")
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def seconds_of(rows: list[Row]) -> float:
    """Returns the CPU seconds that the runs took in all."""
    return sum(row["seconds"] for row in rows)


def one_thread() -> None:
    """Leaves the other cores to the other runs."""
    torch.set_num_threads(1)
