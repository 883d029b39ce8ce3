"""Time of an optimizer step on the CPU, side by side: Prodigy fused, torch's AdamW(fused=True), prodigyopt.

    python bench/speed.py [--threads N] [--rounds N] [--in-a-row N] [--csv FILE]

The optimizers take turns (A B C A B C ...) on tensors and fresh random gradients of their own, so that a noisy machine
is unfair to all of them alike, and each finds the cache as the others left it. Medians; ratios are what counts.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prodigyopt
import torch

from prodigy_fused import Prodigy, __version__

BYTES_PER_PARAMETER = 40  # the update pass with slice_p=1: reads g, x, m, v, s, x0, writes x, m, v, s
WORKLOADS = {
    "16 x 4 M": ([1 << 22] * 16, 12),
    "200 x 100,000": ([100_000] * 200, 30),
    "1,000 x 1,000": ([1_000] * 1000, 100),
}
PEERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "prodigy_fused": lambda params: Prodigy(params, fused=True),
    "AdamW(fused)": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "prodigyopt": prodigyopt.Prodigy,
}


def race(sizes: list[int], rounds: int, in_a_row: int) -> dict[str, list[float]]:
    """Milliseconds of each step of every peer; the first three, which create state and warm up, are left out."""
    torch.manual_seed(0)
    params = {name: [torch.nn.Parameter(torch.randn(n)) for n in sizes] for name in PEERS}
    optimizers = {name: make(params[name]) for name, make in PEERS.items()}
    times: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(rounds + 3):
        for name, optimizer in (turn for turn in optimizers.items() for _ in range(in_a_row)):
            for p in params[name]:
                p.grad = torch.randn_like(p)
            start = time.perf_counter()
            optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - start))
            optimizer.zero_grad()
    return {name: t[3 * in_a_row :] for name, t in times.items()}


def copy_bandwidth(elements: int = 1 << 26, rounds: int = 9) -> float:
    """GB/s, read and written bytes both counted, of torch's copy of a large float32 tensor."""
    source, target = torch.randn(elements), torch.empty(elements)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 8 * elements / statistics.median(times) / 1e9


def environment() -> dict[str, Any]:
    """What a row must carry to be compared with another."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{len(cpu)} x {cpu[0]}",
        "threads": torch.get_num_threads(),
    }


def rows(workload: str, times: dict[str, list[float]], bandwidth: float, in_a_row: int) -> list[dict[str, Any]]:
    """One row per peer: quartiles, and the ratios to AdamW and to the time in which the bytes could be copied."""
    sizes, _ = WORKLOADS[workload]
    adamw = statistics.median(times["AdamW(fused)"])
    copy = BYTES_PER_PARAMETER * sum(sizes) / bandwidth / 1e6
    result = []
    for name, t in times.items():
        low, median, high = statistics.quantiles(t, n=4)
        result.append(
            {
                "workload": workload,
                "in_a_row": in_a_row,
                "peer": name,
                "ms": round(median, 3),
                "ms_25%": round(low, 3),
                "ms_75%": round(high, 3),
                "per_AdamW": round(median / adamw, 3),
                "per_copy_of_40B": round(median / copy, 3),
                "copy_GB/s": round(bandwidth, 1),
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="steps per optimizer (default: by workload)")
    parser.add_argument(
        "--in-a-row", type=int, default=1, help="steps an optimizer takes at its turn: more, warmer caches"
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    measured = []
    for workload, (sizes, rounds) in WORKLOADS.items():
        # Measured right before, because a shared machine's bandwidth is not the same from one minute to the next.
        measured += rows(workload, race(sizes, args.rounds or rounds, args.in_a_row), copy_bandwidth(), args.in_a_row)
        print(f"\n{workload} parameters", *(f"{k}={v}" for k, v in environment().items() if k in ("threads", "torch")))
        for row in measured[-len(PEERS) :]:
            print(f"  {row['peer']:<14} {row['ms']:9.3f} ms   {row['per_AdamW']:7.3f} x AdamW(fused)")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*environment(), *measured[0]])
            if new:
                writer.writeheader()
            writer.writerows({**environment(), **row} for row in measured)


if __name__ == "__main__":
    main()
