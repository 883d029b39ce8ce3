"""Sharded runs: the same d, bit by bit on all ranks, and that of the run on one rank.

Each number of ranks is a set of processes that run all of their cases, because starting them takes most of the time.
"""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from toolbox import feed, make, make_params, train

from prodigy_fused import Prodigy, state

HERE = Path(__file__).parent


def run_rank(rank, ranks, folder, names):
    import sharded_cases  # only there: its imports are slow
    import sharded_checkpoints  # noqa: F401
    import sharded_release  # noqa: F401

    sharded_cases.run_rank(rank, ranks, folder, names)


def start(ranks, folder, names):
    # The processes are forked from one that has imported everything, once; it finds modules by this path only.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    mp.get_context("forkserver").set_forkserver_preload(["sharded_checkpoints", "sharded_release"])
    processes = mp.start_processes(
        run_rank, (ranks, str(folder), names), nprocs=ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + 600
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    except mp.ProcessRaisedException:
        pass  # after a case that failed on one rank only, of which there is a file
    finally:
        for process in processes.processes:
            process.kill()


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    wanted = [item.callspec.params for item in request.session.items if item.originalname == "test_case"]
    found = {}
    for ranks in (2, 4):
        names = [params["name"] for params in wanted if params["ranks"] == ranks]
        folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
        if names:
            start(ranks, folder, names)
        found |= {(name, ranks): [outcome(folder / f"{name}-{rank}.pt") for rank in range(ranks)] for name in names}
    return found


def outcome(file):
    return torch.load(file) if file.exists() else "not reached"


# sharded_cases.py, sharded_checkpoints.py and sharded_release.py have them, by these names and numbers of ranks.
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
    ("replicas of FSDP2", 4),
    ("one collective a step", 2),
    ("an inf on one rank", 2),
    ("gradients that are still to be added up", 2),
    ("what is refused", 2),
    ("16 bits", 2),
    ("16 bits", 4),
    ("8 bits", 2),
    ("full state dict", 2),
    ("a checkpoint of the reference", 2),
    ("a state dict in its own layout", 2),
    ("files, 2 to 4 to 1", 4),
    ("gradient release", 2),
    ("DDP", 2),
    ("FSDP1, gradients only", 2),
    ("FSDP1, ShardedGradScaler", 2),
    ("parts that nobody is told of", 2),
    ("process groups that are not", 2),
    ("HSDP, with one of its dimensions", 4),
    ("a group that comes later", 2),
]  # fmt: skip

if not hasattr(torch.cpu.Stream, "record_event"):  # torch 2.6: no five rows on four ranks, no files in a part of them
    RUNS = [run for run in RUNS if "FSDP2+TP+SP" not in run[0] and run[0] != "files, 2 to 4 to 1"]


# Ways that differ from others in the number of ranks only, or of two that share their code in the options.
SIMILAR = {
    ("FSDP2, plain", 4), ("FSDP2, sampled", 4), ("HSDP, plain", 4), ("FSDP2+TP, plain", 4), ("FSDP2+TP+SP, sampled", 4),
    ("FSDP2 by columns, plain", 2), ("TP, sampled", 2), ("TP+SP, plain", 2), ("16 bits", 4),
    ("FSDP1, not sharded, original parameters", 2), ("FSDP1, hybrid", 4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ranks"), [pytest.param(*run, marks=[pytest.mark.slow] * (run in SIMILAR)) for run in RUNS]
)
def test_case(outcomes, name, ranks):
    wrong = [f"on rank {rank}: {found}" for rank, found in enumerate(outcomes[name, ranks]) if found != "passed"]
    assert not wrong, "\n".join(wrong)


# -- one process -------------------------------------------------------------------------------------------------------


def step_of_parts(opt, wholly):
    """As ZeRO-1 does, which leaves one of the groups in its place, or ZeRO-3, one of the parameters."""
    everything = opt.param_groups
    for group in everything:
        params = group["params"]
        for part in [params] if wholly else [[p] for p in params]:
            opt.param_groups, group["params"] = [group], part
            try:
                opt.step()
            finally:
                opt.param_groups, group["params"] = everything, params


@pytest.mark.parametrize("wholly", [True, False])
def test_steps_for_parts_of_the_parameters_are_noticed(wholly):
    params = make_params()
    opt = make(None, [{"params": params[:2]}, {"params": params[2:]}] if wholly else params)
    feed(opt, 0)
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*one parameter group.*sub_group_size"):
        step_of_parts(opt, wholly)
    assert opt.param_groups[0]["k"] == 1  # the second step has changed nothing
    assert sum(state.is_there(entry) for entry in opt.state.values()) == (2 if wholly else 1)


def test_parameters_that_are_replaced_for_good():
    opt = make()
    train(opt, steps=2)
    opt.state.clear()
    opt.param_groups[0]["params"] = make_params()
    train(opt, steps=2)
    assert opt.param_groups[0]["k"] == 4


def test_a_scaler_of_plain_shards_is_left_to_unscale():
    """Each rank's GradScaler would look for infinities in its own shards only."""
    params = make_params()
    for options, wanted in (({}, True), ({"fsdp_in_use": True}, False)):
        opt = Prodigy(params[:2], fused=True, **options)
        assert opt._step_supports_amp_scaling is wanted
    opt = Prodigy(params[:2], fused=True)
    params[2]._fsdp_flattened = True
    opt.add_param_group({"params": params[2:]})
    assert opt._step_supports_amp_scaling is False
