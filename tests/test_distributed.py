"""Two processes, each with its half of every tensor: one estimate d, that of a single process with all.

Sharding is by hand (gloo, on the loopback interface), so what is tested is ``fsdp_in_use`` itself. All
scenarios run in one pair of processes, because starting it takes most of the time.
"""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toolbox import ON_CPU, TIGHT, gradient, make, make_params
from torch import nn

WORLD, STEPS = 2, 8
SHAPES = ((4, 3), (6,), (2, 5))
EVERY = tuple(range(STEPS))

# (options, steps in which a rank has gradients, the lr that a rank has in a step[, steps in which a rank finds an inf])
SCENARIOS = {
    "plain": ({}, {0: EVERY, 1: EVERY}, {}),
    "decay": ({"weight_decay": 0.1, "use_bias_correction": True}, {0: EVERY, 1: EVERY}, {}),
    "no momentum": ({"betas": (0.0, 0.99)}, {0: EVERY, 1: EVERY}, {}),
    "rank 1 pauses": ({}, {0: EVERY, 1: (0, 1, 2, 5, 6)}, {}),
    "rank 1 starts late": ({}, {0: EVERY, 1: (4, 5, 6, 7)}, {}),
    "rank 1 never has gradients": ({}, {0: EVERY, 1: ()}, {}),
    "warm-up from zero": ({}, {0: EVERY, 1: EVERY}, {(r, t): t / 4 for r in (0, 1) for t in range(4)}),
    "rank 1 has lr 0": ({}, {0: EVERY, 1: EVERY}, {(1, 2): 0.0, (1, 3): 0.0, (1, 7): 0.0}),
    "an inf on one rank": ({}, {0: EVERY, 1: EVERY}, {}, {0: (5,), 1: (0, 3, 5)}),
}
# An interpreter is too slow for more than one of them.
RUNS = [(name, backend) for name in SCENARIOS for backend in ON_CPU if backend != "triton"]
RUNS += [("rank 1 pauses", "triton")] if "triton" in ON_CPU else []


def shards(rank):
    """A rank's rows of every parameter; the second parameter of rank 0 is all zero, that of rank 1 is not."""
    whole = make_params(shapes=SHAPES)
    whole[1].data[: SHAPES[1][0] // WORLD] = 0.0
    return [nn.Parameter(p.detach().chunk(WORLD)[rank].clone()) for p in whole]


def feed_rank(params, rank, t, busy):
    for i, p in enumerate(params):
        p.grad = gradient(p, 10 * rank + i, t) if t in busy[rank] else None


def run_rank(rank, backend, options, busy, lrs, infs=None):
    params = shards(rank)
    opt = make(backend, params, fsdp_in_use=True, **options)
    trace = []
    for t in EVERY:
        opt.param_groups[0]["lr"] = lrs.get((rank, t), 1.0)
        feed_rank(params, rank, t, busy)
        if infs:
            opt.found_inf = torch.tensor(float(t in infs[rank]))
        opt.step()
        published = opt.param_groups[0]
        trace.append((opt.d, int(published["k"]), type(published["d"]).__name__))
    shapes = [tuple(state["p0"].shape) for state in opt.state.values()]
    return {"trace": trace, "params": [p.detach() for p in params], "p0": shapes}


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)  # a rank missing in a collective is an error, not a hang
    dist.init_process_group("gloo", f"file://{folder}/store", limit, WORLD, rank)
    for name, backend in RUNS:
        torch.save(run_rank(rank, backend, *SCENARIOS[name]), f"{folder}/{name}-{backend}-{rank}.pt")
    dist.destroy_process_group()


def once(make, folder, begun):
    """Calls ``make`` in one of the workers of a parallel run; the others wait until it is done."""
    done = folder / "done"
    try:
        begun.touch(exist_ok=False)
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not done.exists():
            assert time.monotonic() < deadline, "the worker that runs the ranks has failed"
            time.sleep(0.2)
        return
    make(folder)
    done.touch()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    common = tmp_path_factory.getbasetemp()
    common = common.parent if "PYTEST_XDIST_WORKER" in os.environ else common
    folder = common / "ranks"
    folder.mkdir(exist_ok=True)
    once(run_ranks, folder, common / "ranks-begun")
    return folder


def run_ranks(folder):
    processes = mp.spawn(worker, (str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + 240
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()


def single(options, busy, lrs, infs=None):
    """One process with all shards, one group for each rank; an inf on any rank skips the step on all."""
    ranks = [shards(rank) for rank in range(WORLD)]
    opt = make("reference", [{"params": params} for params in ranks], **options)
    trace = []
    for t in EVERY:
        for rank, params in enumerate(ranks):
            opt.param_groups[rank]["lr"] = lrs.get((rank, t), 1.0)
            feed_rank(params, rank, t, busy)
        if infs:
            opt.found_inf = torch.tensor(float(any(t in steps for steps in infs.values())))
        opt.step()
        trace.append((opt.d, opt.param_groups[0]["k"]))
    return trace, ranks


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_ranks_agree_with_one_process(outcomes, name, backend):
    trace, params = single(*SCENARIOS[name])
    assert trace[-1][0] > trace[0][0]
    ranks = [torch.load(outcomes / f"{name}-{backend}-{rank}.pt") for rank in range(WORLD)]
    assert ranks[0]["trace"] == ranks[1]["trace"], "the ranks' d drift apart"
    for (d, k, kind), (wanted, steps) in zip(ranks[0]["trace"], trace, strict=True):
        assert d == pytest.approx(wanted, rel=TIGHT)
        assert k == steps
        assert kind == "float" or backend == "emulated"
    for rank, wanted in zip(ranks, params, strict=True):
        for p, q in zip(rank["params"], wanted, strict=True):
            assert torch.allclose(p, q, rtol=0, atol=TIGHT * q.abs().max().item())


@pytest.mark.parametrize("backend", [backend for name, backend in RUNS if name == "plain"])
def test_shapes_of_the_state_do_not_depend_on_a_shards_values(outcomes, backend):
    ranks = [torch.load(outcomes / f"plain-{backend}-{rank}.pt") for rank in range(WORLD)]
    assert ranks[0]["p0"] == ranks[1]["p0"] == [(2, 3), (3,), (1, 5)]


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_a_process_group_it_is_a_single_process(backend):
    alone, sharded = (make(backend, make_params(shapes=SHAPES), fsdp_in_use=on) for on in (False, True))
    for t in EVERY:
        for opt in (alone, sharded):
            feed_rank(opt.param_groups[0]["params"], 0, t, {0: EVERY})
            opt.step()
    assert alone.d == sharded.d > alone.param_groups[0]["d0"]


def test_parameters_of_fsdp_are_recognised():
    """FSDP1 marks its flat parameters; the state of an all-zero shard must still have the shard's shape."""
    p = nn.Parameter(torch.zeros(5))
    p._fsdp_flattened = True
    opt = make(None, [p])
    p.grad = torch.ones(5)
    opt.step()
    assert opt.state[p]["p0"].shape == (5,)
