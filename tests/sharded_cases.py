"""The cases of test_sharding.py, and how a rank runs them."""

from __future__ import annotations

import copy
import datetime
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from oracle import Prodigyopt
from sharded import (
    D0,
    ONLY_4,
    OPTIONS,
    STEPS,
    WAYS,
    Collectives,
    Net,
    backward,
    close,
    compare,
    equal_on_all_ranks,
    fsdp2,
    mesh2d,
    net,
    whole,
    world,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, ShardingStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from prodigy_fused import Prodigy

CASES: dict[str, Callable[[], None]] = {}
WORLDS: dict[str, tuple[int, ...]] = {}


def case(name: str, *worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a case for these numbers of ranks."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        CASES[name], WORLDS[name] = run, worlds
        return run

    return register


def run_rank(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    """Runs the cases on one rank, and writes of each whether it passed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=240)  # a rank missing in a collective is an error, not a hang
    dist.init_process_group("gloo", f"file://{folder}/store", limit, ranks, rank)
    for name in names:
        try:
            CASES[name]()
            outcome = "passed"
        except BaseException:
            outcome = traceback.format_exc()
        torch.save(outcome, f"{folder}/{name}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def _case(way: str, options: str, worlds: tuple[int, ...]) -> None:
    @case(f"{way}, {options}", *worlds)
    def run() -> None:
        model = WAYS[way](net())
        compare(model, Prodigy(model.parameters(), d0=D0, **OPTIONS[options]), **OPTIONS[options])


for way in WAYS:
    for options in OPTIONS:
        _case(way, options, (4,) if way in ONLY_4 else (2, 4) if way == "FSDP2" else (2,))


# -- which tensors are counted -----------------------------------------------------------------------------------------


@case("CPU offload", 2)
def _() -> None:
    model = fsdp2(net(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    compare(model, Prodigy(model.parameters(), d0=D0))


@case("mixed precision", 2)
def _() -> None:
    """The gradients are others; given these, the run on one rank is the same."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    model, alone = fsdp2(net(), mp_policy=policy), net()
    opt, theirs = Prodigy(model.parameters(), d0=D0), Prodigyopt(alone.parameters(), d0=D0)
    for t in range(STEPS):
        backward(model, t)
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.full_tensor()
        opt.step()
        theirs.step()
    assert opt.d > 2 * D0 and abs(opt.d / theirs.d - 1) < 1e-11
    close(whole(model), whole(alone))


def _fsdp1(name: str, *worlds: int, **options: Any) -> None:
    @case(f"FSDP1, {name}", *worlds)
    def run() -> None:
        model, more = net(), dict(options)
        if more.pop("ignored", False):
            more["ignored_modules"] = [model.blocks[0], model.head]
        if more.pop("hybrid", False):
            more |= {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh2d()}
        model = FSDP(model, device_id=torch.device("cpu"), **more)
        compare(model, Prodigy(model.parameters(), d0=D0))


for original in (False, True):
    suffix = ", original parameters" if original else ""
    _fsdp1("full" + suffix, 2, use_orig_params=original)
    _fsdp1("not sharded" + suffix, 2, use_orig_params=original, sharding_strategy=ShardingStrategy.NO_SHARD)
    _fsdp1("ignored modules" + suffix, 2, use_orig_params=original, ignored=True)
    _fsdp1("hybrid" + suffix, 4, use_orig_params=original, hybrid=True)


@case("ZeroRedundancyOptimizer", 2)
def _() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns

    model, alone = net(), net()
    theirs = Prodigyopt(alone.parameters(), d0=D0)
    opt = ZeroRedundancyOptimizer(model.parameters(), Prodigy, d0=D0, fsdp_in_use=True)
    for t in range(STEPS):
        backward(model, t)
        backward(alone, t)
        opt.step()
        theirs.step()
    opt.consolidate_state_dict(0)
    saved: list[Any] = [opt.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    again = ZeroRedundancyOptimizer(model.parameters(), Prodigy, d0=D0, fsdp_in_use=True)
    again.load_state_dict(saved[0])
    for t in range(STEPS, STEPS + 3):
        backward(model, t)
        backward(alone, t)
        again.step()
        theirs.step()
    assert abs(again.optim.d / theirs.d - 1) < 1e-11 and theirs.d > 2 * D0
    close(whole(model), whole(alone))


def _own(model: Net) -> list[nn.Parameter]:
    """As a stage of a pipeline: this rank's part of the parameters."""
    return list(model.parameters())[dist.get_rank() :: dist.get_world_size()]


def _owned(make: Callable[[list[nn.Parameter]], Prodigy]) -> None:
    """Every rank has all gradients, and steps its own parameters."""
    model, alone = net(), net()
    opt, theirs = make(_own(model)), Prodigyopt(alone.parameters(), d0=D0)
    for t in range(STEPS):
        backward(alone, t)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            p.grad = q.grad.clone()
        opt.step()
        theirs.step()
        equal_on_all_ranks(opt.d.hex())
    numbers = [abs(opt.param_groups[0][name] / theirs.param_groups[0][name] - 1) for name in ("d", "d_numerator")]
    assert max(numbers) < 1e-11 and theirs.d > 2 * D0
    close(_own(model), _own(alone))


@case("owned, process group", 2)
def _() -> None:
    _owned(lambda params: Prodigy(params, d0=D0, process_group=dist.group.WORLD))


@case("owned, mesh", 4)
def _() -> None:
    _owned(lambda params: Prodigy(params, d0=D0, process_group=mesh2d()))


@case("owned, a copy has to be given its group", 2)
def _() -> None:
    def make(params: list[nn.Parameter]) -> Prodigy:
        opt = copy.copy(copy.deepcopy(Prodigy([nn.Parameter(torch.ones(2))], d0=D0, process_group=dist.group.WORLD)))
        opt.param_groups[0]["params"] = params
        params[0].grad = torch.ones_like(params[0])
        try:
            opt.step()
        except RuntimeError as error:
            assert "opt.process_group" in str(error)
        else:
            raise AssertionError("not noticed")
        opt.process_group = dist.group.WORLD
        return opt

    _owned(make)


@case("stages of FSDP2", 4)
def _() -> None:
    """Each row of the mesh is a stage with blocks of its own: its ranks cannot know of the others."""
    mesh = mesh2d()
    stage = mesh.get_local_rank("dp")
    model, alone = net(), net()
    own = fsdp2(model, mesh=mesh["tp"])
    names = [name for i, (name, _) in enumerate(alone.named_parameters()) if i % 2 == stage]
    params = [p for name, p in own.named_parameters() if name in names]
    theirs = Prodigyopt(alone.parameters(), d0=D0)
    backward(model, 0)
    try:
        Prodigy(params, d0=D0).step()
    except RuntimeError as error:
        assert "process_group=" in str(error)
    else:
        raise AssertionError("not noticed")
    opt = Prodigy(params, d0=D0, process_group=mesh)
    for t in range(STEPS):
        backward(alone, t)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        opt.step()
        theirs.step()
        equal_on_all_ranks(opt.d.hex())
    assert abs(opt.d / theirs.d - 1) < 1e-11 and theirs.d > 2 * D0
    close([p.full_tensor() for p in params], [p for name, p in alone.named_parameters() if name in names])


@case("replicas of FSDP2", 4)
def _() -> None:
    """The ranks of one replica share the estimate; they are a mesh of two dimensions, which has no group yet."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replica", "one", "dp"))
    model = fsdp2(net(), mesh=mesh["dp"])
    compare(model, Prodigy(model.parameters(), d0=D0, process_group=mesh["one", "dp"]))


# -- what a step exchanges ---------------------------------------------------------------------------------------------


@case("one collective a step", 2)
def _() -> None:
    model = fsdp2(net())
    groups = [{"params": list(block.parameters())} for block in model.blocks]
    opt = Prodigy(groups, d0=D0, split_groups=True)
    rank = dist.get_rank()

    def step(wanted: list[int]) -> None:
        with Collectives() as sent:
            opt.step()
        assert sent.sizes == wanted, (sent.sizes, wanted)
        # Not an all-reduce, which may add in another order in each replica.
        assert "allgather" in sent.names[-1].replace("_", ""), sent.names

    backward(model, 0)
    if rank == 1:
        model.zero_grad()
    step([32])  # a rank whose first step has no gradients
    assert (len(opt.state) == 0) == (rank == 1)
    backward(model, 1)
    step([32])
    for group in opt.param_groups:
        group["lr"] = 0.0 if rank == 0 else 1.0
    step([32])
    opt.found_inf = torch.tensor(float(rank))
    before = [p.detach().to_local().clone() for p in model.parameters()]
    step([4, 32])
    opt.found_inf = None
    assert all(torch.equal(p.detach().to_local(), q) for p, q in zip(model.parameters(), before, strict=True))
    model.zero_grad()
    step([32])
    equal_on_all_ranks([(group["d"].hex(), group["k"]) for group in opt.param_groups])


@case("an inf on one rank", 2)
def _() -> None:
    for fused in (True, False):
        model = fsdp2(net())
        opt = Prodigy(model.parameters(), d0=D0, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        for t in range(6):
            backward(model, t)
            for p in model.parameters():
                p.grad *= scaler.scale(torch.ones(())).item()
            if t == 2 and dist.get_rank() == 1:
                model.head.weight.grad.to_local()[0, 0] = torch.inf
            scaler.step(opt)
            scaler.update()
            equal_on_all_ranks((scaler.get_scale(), opt.d.hex(), opt.step_count))
        assert (opt.step_count, scaler.get_scale()) == (5, 4.0)


@case("gradients that are still to be added up", 2)
def _() -> None:
    """All in one collective; the gradients themselves stay as they are."""
    mesh = world()
    values = [torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    placements = [Replicate(), Shard(0), Shard(1)]
    params = [nn.Parameter(distribute_tensor(v, mesh, [where])) for v, where in zip(values, placements, strict=True)]
    alone = [nn.Parameter(v.clone()) for v in values]
    opt, theirs = Prodigy(params, d0=D0), Prodigyopt(alone, d0=D0)
    for t in range(4):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            q.grad = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * t + i)) + 1
            part = q.grad * (0.25 if dist.get_rank() == 0 else 0.75)
            p.grad = DTensor.from_local(part, mesh, [Partial("avg" if i == 1 else "sum")], run_check=False)
            if i == 1:
                p.grad.to_local().mul_(2)
        kept = [p.grad.to_local().clone() for p in params]
        with Collectives() as sent:
            opt.step()
        theirs.step()
        assert sent.sizes == [2 * 160, 160, 16], sent.sizes
        assert all(torch.equal(p.grad.to_local(), g) for p, g in zip(params, kept, strict=True))
    assert abs(opt.d / theirs.d - 1) < 1e-11 and theirs.d > D0
    close([p.full_tensor() for p in params], alone)


def refused(error: type[Exception], words: str, act: Callable[[], Any]) -> None:
    """Asserts that a call raises an error with these words."""
    try:
        act()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"not refused: {words}")


@case("what is refused", 2)
def _() -> None:
    mesh, other = world(), DeviceMesh("cpu", [1, 0])
    whole = torch.ones(4, 3, dtype=torch.float64)
    terms = nn.Parameter(DTensor.from_local(whole, mesh, [Partial()], run_check=False))
    refused(TypeError, "parameter 0 of shape (4, 3) has partial values", lambda: Prodigy([terms]))
    sharded, plain = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])), nn.Parameter(whole.clone())
    opt = Prodigy([sharded], d0=D0)
    sharded.grad = distribute_tensor(whole, other, [Shard(0)])
    refused(ValueError, "the gradient of parameter 0 of shape (4, 3) is on DeviceMesh", opt.step)
    mixed = Prodigy([plain, sharded], d0=D0)
    plain.grad, sharded.grad = whole, distribute_tensor(whole, mesh, [Shard(0)])
    mixed.step()
    assert len(mixed.state) == 2
    sharded._local_tensor = sharded._local_tensor.clone()  # as FSDP2 does in its first forward, and module.to()
    mixed.step()
    assert torch.equal(sharded.full_tensor(), plain) and not torch.equal(plain, whole)


# -- indices -----------------------------------------------------------------------------------------------------------

LOW = {
    "stochastic": {"state_dtype": "bfloat16"},
    "stochastic, sampled": {"state_dtype": "bfloat16", "slice_p": 3},
    "displacement": {"low_precision": "displacement"},
    "24 bits": {"low_precision": "24bit", "slice_p": 3},
}


@case("16 bits", 2, 4)
def _() -> None:
    """Bit by bit the run on one rank: samples and random bits go by the index in the whole tensor."""
    mesh = mesh2d() if dist.get_world_size() == 4 else DeviceMesh("cpu", [[0, 1]])
    shapes = ((12, 8), (7, 9), (3, 5, 8), (11,))
    ways = ([Replicate(), Shard(1)], [Shard(0), Shard(0)], [Shard(1), Shard(2)], [Replicate(), Shard(0)])
    for options in LOW.values():
        for dtype in (torch.bfloat16, torch.float16):
            if (options.get("low_precision"), dtype) == ("24bit", torch.float16):
                continue  # refused
            params, alone = [], []
            for i, (shape, way) in enumerate(zip(shapes, ways, strict=True)):
                value = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
                params.append(nn.Parameter(distribute_tensor(value, mesh, way)))
                alone.append(nn.Parameter(value.clone()))
            opt, theirs = (Prodigy(p, d0=D0, foreach=False, **options) for p in (params, alone))
            for t in range(6):
                for i, (p, q) in enumerate(zip(params, alone, strict=True)):
                    fixed = torch.randn(q.shape, generator=torch.Generator().manual_seed(i))
                    noise = torch.randn(q.shape, generator=torch.Generator().manual_seed(100 * t + i))
                    q.grad = (fixed + 0.3 * noise).to(dtype)
                    p.grad = distribute_tensor(q.grad, mesh, p.placements)
                opt.step()
                theirs.step()
            assert abs(opt.d / theirs.d - 1) < 1e-6 and theirs.d > D0
            different = [int((p.full_tensor() != q).sum()) for p, q in zip(params, alone, strict=True)]
            assert different == [0] * 4, (options, dtype, different)
            if options.get("low_precision") == "24bit":
                kept = [o.float32_weights() for o in (opt, theirs)]
                assert all(
                    torch.equal(kept[0][p].full_tensor(), kept[1][q]) for p, q in zip(params, alone, strict=True)
                )
