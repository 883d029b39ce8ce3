"""The paper's experiments, on the product's own optimizers; see docs/paper.md.

make paper                       Figure 1 and the questions: under 15 minutes on 2 cores, large sets sampled
make paper ARGS=--full           with all their rows
make paper ARGS="figure1 reset"  these only; "networks": all experiments with networks
make paper ARGS="--full --out bench/results/paper"  rows for the record; then: make figures

Rows and figures go to build/paper. A run that has a row there is not done again: remove NAME.csv to start anew.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules here are the package `paper`
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paper import data, experiments, report, store
from paper.store import Row, Store


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `names` are those of experiments then, and `stores` their rows. Exits where there is no
    such experiment, or not its data."""
    known = experiments.names()
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {experiments.load(name).__doc__.splitlines()[0]}" for name in known]
    parser = argparse.ArgumentParser(
        description="\n".join([__doc__, "experiments:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"an experiment, or all of {', '.join(experiments.PARTS)}"
    )
    parser.add_argument("--full", action="store_true", help="as large as the paper's: large data sets are not sampled")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, with one thread each")
    parser.add_argument("--out", type=Path, default=Path("build/paper"), help="the folder of the rows and figures")
    figures = "no runs: write the figures and docs/paper.md from the committed rows"
    parser.add_argument("--figures", action="store_true", help=figures)
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    wrong = [name for name in args.names if name not in (*known, *experiments.PARTS)]
    if wrong:
        parser.error(f"no experiment {wrong[0]!r}: there are {', '.join((*known, *experiments.PARTS))}")
    if args.figures:
        if args.names or args.full:
            parser.error("--figures is of all committed rows")
        return args
    asked = args.names or ["convex"]
    args.names = [name for name in known if {name, experiments.load(name).PART} & set(asked)]
    try:
        for package in sorted({package for name in args.names for package in experiments.load(name).PACKAGES}):
            data.folder(package)
        args.stores = {name: report.store_of(name, args.out) for name in args.names}
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return args


def work(name: str, key: Row) -> Row:
    """Does one run of an experiment; returns its row without the environment, but with the seconds of the CPU."""
    store.one_thread()
    start = time.process_time()
    found = experiments.load(name).run(key)
    return {**key, **found, "seconds": time.process_time() - start}


def outcomes(todo: list[tuple[str, Row]], jobs: int) -> Iterator[tuple[str, Row]]:
    """Yields the name of the experiment, and what `work` returns, of each run, in the order in which they end."""
    if jobs == 1:
        yield from ((name, work(name, key)) for name, key in todo)
        return
    # New processes, not copies of this one: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            futures = {pool.submit(work, name, key): name for name, key in todo}
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def run(stores: dict[str, Store], full: bool, jobs: int) -> int:
    """Does the runs that have no row yet, and adds their rows as they end; returns their number."""
    wanted = [(name, key) for name in stores for key in experiments.load(name).runs(full)]
    todo = [(name, key) for name, key in wanted if not stores[name].done(key)]
    where = store.environment()
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        counts = Counter(name for name, _ in wanted)
        bars = {name: progress.add_task(name, total=count) for name, count in counts.items()}
        for name, key in wanted:
            progress.advance(bars[name], stores[name].done(key))
        for name, row in outcomes(todo, jobs):
            stores[name].append({**row, **where})
            progress.advance(bars[name])
    return len(todo)


def main(argv: list[str] | None = None) -> None:
    """Does the runs, prints tables and verdicts, and draws the figures."""
    args = parse_arguments(argv)
    if args.figures:
        report.write_all()
        return
    start = time.perf_counter()
    try:
        done = run(args.stores, args.full, args.jobs)
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on where it was") from None
    for name, own in args.stores.items():
        report.show(name, own.rows)
        report.draw(name, own.rows, args.out)
    print(f"\n{done} runs in {time.perf_counter() - start:.0f} s; rows and figures are in {args.out}")


if __name__ == "__main__":
    main()
