"""Races launch geometries of the CUDA kernels, which are constants of the table in csrc/cuda/policy.h.

python3 bench/geometry.py --out FOLDER      on a machine with a GPU, three minutes if it has 16 cores

Of each variant a copy of the tree, with another table, is built, all at a time. Each then times the ways to store and
to sample (bench/run.py), and the times relative to AdamW(fused) are printed side by side.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import rows
from peers import ANCHOR
from shared import ROOT

ROW = re.compile(r"(Policy<.+?, +(?:Every|No|Any)\w+, +)(\d+), (\d+), +(\d+)(?:, (\d+))?>")
LONGEST = 32  # kLongestChunk of policy.h


class Geometry(NamedTuple):
    """Of a row of the table; chunk and tile in thousands of 1,024 elements."""

    threads: int
    blocks: int
    chunk: int
    tile: int

    def with_threads(self, threads: int) -> Geometry:
        """Returns the same number of threads on a multiprocessor, or a few fewer, in other blocks."""
        threads = min(512, max(128, threads))
        return self._replace(threads=threads, blocks=max(1, self.blocks * self.threads // threads))


VARIANTS: dict[str, Callable[[Geometry], Geometry]] = {
    "as it is": lambda g: g,
    "half chunks": lambda g: g._replace(chunk=max(1, g.chunk // 2), tile=max(1, g.tile // 2)),
    "double chunks": lambda g: g._replace(chunk=min(LONGEST, 2 * g.chunk)),
    "small blocks": lambda g: g.with_threads(g.threads // 2),
    "large blocks": lambda g: g.with_threads(2 * g.threads),
}
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "*.so", "results", "tests", "docs")


def rewritten(policies: str, variant: str) -> str:
    """Returns the text of policy.h with another geometry in each row of its table of *update*."""

    def geometry(row: re.Match[str]) -> str:
        new = VARIANTS[variant](Geometry(*(int(row[i] or row[4]) for i in (2, 3, 4, 5))))
        tile = f", {new.tile}" if row[5] else ""
        return f"{row[1]}{new.threads}, {new.blocks}, {new.chunk:2}{tile}>"

    begin, end = policies.index("using UpdatePolicies"), policies.index("using FinishPolicies")
    return policies[:begin] + ROW.sub(geometry, policies[begin:end]) + policies[end:]


def copied(variant: str, folder: Path) -> Path:
    """Returns a copy of the tree that has the variant's table."""
    tree = folder / variant.replace(" ", "-")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    table = tree / "csrc" / "cuda" / "policy.h"
    table.write_text(rewritten(table.read_text(), variant))
    return tree


def command(tree: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts a script of a tree, which finds the package of that tree."""
    env = {"CMAKE_ARGS": "-DCMAKE_CUDA_ARCHITECTURES=native", **os.environ, "PRODIGY_FUSED_CUDA": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=tree, env={**env, "PYTHONPATH": str(tree)})


def table(results: dict[str, Path]) -> list[list[str]]:
    """Returns a line for each dtype and peer: the times of its step relative to AdamW(fused), by variant."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for variant, path in results.items():
        found = rows.read(path) if path.is_file() else []
        for row in found:
            if (ratio := rows.ratio(row, found, ANCHOR)) is not None and row["peer"] != ANCHOR:
                cells.setdefault((row["dtype"], row["peer"]), {})[variant] = f"{ratio:.3f}"
    return [[*key, *(line.get(variant, "") for variant in results)] for key, line in cells.items()]


def main(argv: list[str] | None = None) -> None:
    """Builds and times all variants, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "geometry", help="a folder for the rows")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this; repeatable")
    parser.add_argument("--seconds", type=float, default=1, help="most that the timed turns of a dtype may take")
    args = parser.parse_args(argv)
    variants = args.variant or list(VARIANTS)
    args.out.mkdir(parents=True, exist_ok=True)
    trees = {variant: copied(variant, ROOT / "build" / "geometry") for variant in variants}
    setup = ("setup.py", "-q", "egg_info", "build_ext", "--inplace")
    builds = {variant: command(tree, *setup) for variant, tree in trees.items()}
    trees = {variant: trees[variant] for variant, build in builds.items() if build.wait() == 0}
    results = {variant: (args.out / f"geometry-{tree.name}.csv").resolve() for variant, tree in trees.items()}
    for path in results.values():
        path.unlink(missing_ok=True)
    peers = [f"--peer={name}" for name in (ANCHOR, "prodigy_fused(cuda")]
    for dtype in ("float32", "bfloat16"):  # the variants next to each other, at one temperature
        what = ["--device=cuda", "--workload=16 x 16 Mi", f"--dtype={dtype}", *peers, f"--seconds={args.seconds}"]
        for variant, tree in trees.items():
            command(tree, "bench/run.py", *what, "--csv", str(results[variant])).wait()
    for line in [["dtype", "peer", *results], *table(results)]:
        print(f"{line[0]:9} {line[1]:58}", *(f"{cell:>13}" for cell in line[2:]))


if __name__ == "__main__":
    main()
