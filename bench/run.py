"""The benchmark: optimizers side by side, in turn, on the same gradients; see docs/benchmarks.md.

make bench ARGS="--quick"                        a minute, to see that everything works
make bench                                       under ten minutes on 2 cores; rows go to build/bench/bench.csv
make bench ARGS="--csv bench/results/bench.csv"  rows for the record, from a quiet machine; then: make figures
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Silences the profiler's log; read when torch is imported.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import heats
import measure
import rows
import torch
import train
from measure import Race, Racer
from peers import COPY, IN_PLACE, Peer, table
from report import print_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from shared import machine
from workloads import QUICK, WORKLOADS, Workload

TRAINING = "GPT of the demo"
# Elements of the buffer that is copied: beyond every cache, and small enough that a copy is shorter than the steps.
COPIED = {"cpu": 1 << 26, "cuda": 1 << 29}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; adds the chosen `peers` and the `jobs` on them. Exits where there are none."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="tiny workloads; the rows are marked as such")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workload", action="append", help="only workloads whose name contains this; repeatable")
    parser.add_argument("--peer", action="append", help="only peers whose name contains this; repeatable")
    parser.add_argument("--rounds", type=int, help="turns of every peer (default: by workload)")
    parser.add_argument("--seconds", type=float, default=25, help="most that the timed turns of a heat may take")
    parser.add_argument("--csv", type=Path, default=Path("build/bench/bench.csv"), help="append the rows to this file")
    args = parser.parse_args(argv)
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        parser.error(f"--device={args.device}: {measure.first_line(error)}")
    args.dtype = getattr(torch, args.dtype)
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    args.peers = [peer for peer in table(args.device, args.dtype) if chosen(args.peer, peer.name)]
    if not args.peers:
        parser.error("no such peer")
    args.jobs = jobs(args)
    if not args.jobs:
        parser.error("no such workload, or not on this device")
    return args


def chosen(names: list[str] | None, name: str) -> bool:
    """Returns whether one of `names` is a part of `name`, or there are none."""
    return not names or any(part.lower() in name.lower() for part in names)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def outcome(racer: Racer, peer: Peer | None) -> rows.Row:
    """Returns the columns of a row that are about one racer: its status, and the figures of the timed turns."""
    row = {"peer": racer.name, "package": "", "slice_p": "", "status": racer.status, "reason": racer.reason}
    row |= {"moves": "" if racer.moves is None else racer.moves, **racer.counts}
    if peer is not None:
        row |= {"package": f"{peer.package} {machine.version(peer.package)}".strip(), "slice_p": peer.slice_p}
    if len(racer.samples) < 2 or racer.status != "ok":
        return row
    low, median, high = spread([sample.ms for sample in racer.samples])
    row |= {"rounds": len(racer.samples), "ms": median, "ms_25": low, "ms_75": high}
    for name in ("wall_ms", "host_ms"):
        values = [value for sample in racer.samples if (value := getattr(sample, name)) is not None]
        row[name] = statistics.median(values) if values else ""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def bandwidths(racers: list[Racer], copied: int) -> dict[str, float | str]:
    """Returns the columns with the bandwidth, in GB/s, of the copies that took turns with the optimizers."""
    found: dict[str, float | str] = {}
    for name, column in ((COPY, "copy_gb_s"), (IN_PLACE, "in_place_gb_s")):
        racer = next(r for r in racers if r.name == name)
        times = [sample.ms for sample in racer.samples]
        found[column] = round(8 * copied / statistics.median(times) / 1e6, 2) if times else ""
    return found


def measured(workload: Workload, args: argparse.Namespace, peers: list[Peer], tick: Any) -> Iterator[rows.Row]:
    """Measures one workload; yields its rows, heat by heat."""
    shapes, size = workload.make(), args.dtype.itemsize
    what = {"kind": "step", "workload": workload.name, "tensors": len(shapes), "parameters": workload.elements}
    what["dtype"] = str(args.dtype).removeprefix("torch.")
    copied = COPIED[args.device.type] >> (8 if args.quick else 0)
    budget = int(0.8 * heats.free_bytes(args.device)) - 12 * copied
    unfit = {peer: reason for peer in peers if (reason := peer.unfit(len(shapes), args.device))}
    tensor_bytes = max(size, 4) * workload.elements  # state is in float32 or better
    groups, large = heats.distribute([peer for peer in peers if peer not in unfit], tensor_bytes, budget)
    for peer in large:
        gigabytes = heats.needed([peer], tensor_bytes) / 1e9
        unfit[peer] = f"needs {gigabytes:.0f} GB, {max(budget, 0) / 1e9:.0f} GB are free"
    for peer, reason in unfit.items():
        yield {**what, **outcome(Racer(peer.name, status="not run", reason=reason), peer)}
    for heat, group in enumerate(groups):
        race = Race(shapes, group, args.device, args.dtype, copied)
        racers = race.run(args.rounds or workload.rounds, args.seconds, tick)
        limits = bandwidths(racers, copied)
        for racer in racers:
            count = racer.peer.count if racer.peer else None
            per_parameter = round(count(args.dtype), 3) if count else ""
            own = what if racer.peer else {**what, "tensors": 1, "parameters": copied}
            yield {**own, "heat": heat, **limits, "bytes": per_parameter, **outcome(racer, racer.peer)}


def training_rounds(args: argparse.Namespace) -> int:
    """Returns the timed steps of each peer in the training."""
    return args.rounds or (5 if args.quick else 100)


def trained(args: argparse.Namespace, peers: list[Peer], tick: Any) -> Iterator[rows.Row]:
    """Trains the demo's GPT with every peer; yields the rows."""
    trainers = train.train(peers, args.device, training_rounds(args), tick)
    for trainer in trainers:
        params = list(trainer.model.parameters())
        row = {"kind": "train", "workload": TRAINING, "tensors": len(params), "dtype": "float32", "heat": 0}
        row |= {"parameters": sum(p.numel() for p in params), **outcome(trainer.racer, trainer.racer.peer)}
        if row["status"] == "ok":
            train_ms = statistics.median(trainer.train_ms)
            tokens = train.BATCH * train.SIZES["block"]
            row |= {"train_ms": round(train_ms, 4), "tokens_per_s": round(1e3 * tokens / (train_ms + row["ms"]), 1)}
        yield row


def takes_part(peer: Peer, workload: Workload) -> bool:
    """Returns whether a peer is measured on a workload."""
    if workload.policies:
        return peer.policies
    return peer.plain and (peer.scans or not workload.scan)


def jobs(args: argparse.Namespace) -> list[tuple[str, int, Any]]:
    """Returns the chosen jobs: name, turns, and a function that does the job and yields its rows."""
    found = []
    for workload in QUICK if args.quick else WORKLOADS:
        if not chosen(args.workload, workload.name) or (args.device.type == "cpu" and not workload.cpu):
            continue
        who = [peer for peer in args.peers if takes_part(peer, workload)]
        turns = measure.WARM_UP + (args.rounds or workload.rounds)
        found.append((workload.name, turns, lambda tick, w=workload, p=who: measured(w, args, p, tick)))
    if chosen(args.workload, TRAINING) and args.dtype == torch.float32:
        who = [peer for peer in args.peers if peer.trains]
        turns = train.WARM_UP + training_rounds(args)
        found.append((TRAINING, turns, lambda tick: trained(args, who, tick)))
    return found


def main(argv: list[str] | None = None) -> None:
    """Does all jobs, appends the rows of each to the file when it is done, and prints the table."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    where = rows.environment(args.device, "quick" if args.quick else "full")
    print("  ".join(f"{key}: {value}" for key, value in where.items() if value != ""), flush=True)
    start, found = time.perf_counter(), 0
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    # Redrawn between turns only: a thread that draws would disturb the timings.
    with Progress(*columns, auto_refresh=False) as progress:
        for name, turns, work in args.jobs:
            task = progress.add_task(name, total=turns)

            def tick(task: Any = task, turns: int = turns) -> None:
                done = progress.tasks[task].completed + 1
                # More turns than announced if a workload needs several heats.
                progress.update(task, completed=done, total=max(turns, done), refresh=progress.console.is_terminal)

            for row in work(tick):  # a heat's rows are there even if the next never ends
                rows.append(args.csv, [{**where, **row}])
                found += 1
            progress.update(task, completed=turns, total=turns)
            if not progress.console.is_terminal:
                print(f"{time.perf_counter() - start:5.0f} s  {name}", flush=True)
    print_table([row for row in rows.read(args.csv) if row["run"] == where["run"]])
    print(f"\n{found} rows appended to {args.csv} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
