"""Sharded runs: the same d, bit by bit on all ranks, and that of the run on one rank.

Each number of ranks is a set of processes that run all of their cases, because starting them takes most of the time.
"""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

HERE = Path(__file__).parent


def run_rank(rank, ranks, folder, names):
    import sharded_cases  # only there: its imports are slow

    sharded_cases.run_rank(rank, ranks, folder, names)


def start(ranks, folder, names):
    # The processes are forked from one that has imported everything, once; it finds modules by this path only.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    mp.get_context("forkserver").set_forkserver_preload(["sharded_cases"])
    processes = mp.start_processes(
        run_rank, (ranks, str(folder), names), nprocs=ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + 600
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    wanted = [item.callspec.params for item in request.session.items if item.path == request.path]
    found = {}
    for ranks in (2, 4):
        names = [params["name"] for params in wanted if params["ranks"] == ranks]
        folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
        if names:
            start(ranks, folder, names)
        found |= {(name, ranks): [torch.load(folder / f"{name}-{r}.pt") for r in range(ranks)] for name in names}
    return found


# sharded_cases.py has them, under these names and for these numbers of ranks.
RUNS = [
    *((f"{way}, {options}", ranks) for options in ("plain", "sampled") for way, ranks in (
        ("FSDP2", 2), ("FSDP2 by columns", 2), ("TP", 2), ("TP+SP", 2),
        ("FSDP2", 4), ("HSDP", 4), ("FSDP2+TP", 4), ("FSDP2+TP+SP", 4),
    )),
    *((f"FSDP1, {kind}{suffix}", ranks) for suffix in ("", ", original parameters") for kind, ranks in (
        ("full", 2), ("not sharded", 2), ("ignored modules", 2), ("hybrid", 4),
    )),
    ("CPU offload", 2),
    ("mixed precision", 2),
    ("ZeroRedundancyOptimizer", 2),
    ("owned, process group", 2),
    ("owned, mesh", 4),
    ("owned, a copy has to be given its group", 2),
    ("stages of FSDP2", 4),
    ("one collective a step", 2),
    ("an inf on one rank", 2),
    ("gradients that are still to be added up", 2),
    ("16 bits", 2),
    ("16 bits", 4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ranks"), RUNS)
def test_case(outcomes, name, ranks):
    for rank, outcome in enumerate(outcomes[name, ranks]):
        assert outcome == "passed", f"on rank {rank}: {outcome}"
