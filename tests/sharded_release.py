"""The cases of test_sharding.py with gradient release, and those of replicated parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from oracle import Prodigyopt
from sharded import D0, STEPS, WAYS, Net, backward, close, compare, equal_on_all_ranks, fsdp2, mesh2d, net, whole
from sharded_cases import case, refused
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel as DDP

import prodigy_fused
from prodigy_fused import Prodigy


def _local(opt: Prodigy) -> list[torch.Tensor]:
    params = [p for group in opt.param_groups for p in group["params"]]
    return [getattr(p, "_local_tensor", p).detach().clone() for p in params]


@case("gradient release", 2)
def _() -> None:
    """The bits of the same sharded run without release."""
    kinds: dict[str, Any] = {"FSDP2": {"slice_p": 3}, "TP+SP": {}, "FSDP2 by columns": {"betas": (0.0, 0.99)}}
    for way, options in kinds.items():
        models = [WAYS[way](net()) for _ in range(2)]
        for model in models:
            model.get_parameter("blocks.0.up.bias").requires_grad_(False)
        once, released = (Prodigy(model.parameters(), d0=D0, **options) for model in models)
        prodigy_fused.enable_gradient_release(released)
        for t in range(STEPS):
            for model, opt in zip(models, (once, released), strict=True):
                backward(model, t)
                opt.step()
            assert all(torch.equal(a, b) for a, b in zip(_local(once), _local(released), strict=True)), (way, t)
            assert once.d == released.d
            assert all(p.grad is None for p in models[1].parameters()) or "SP" in way
        equal_on_all_ranks(released.d.hex())


@case("DDP", 2)
def _() -> None:
    model = DDP(net())
    compare(model, Prodigy(model.parameters(), d0=D0))
    opt = Prodigy(model.parameters(), d0=D0)
    refused(RuntimeError, "DistributedDataParallel", lambda: prodigy_fused.enable_gradient_release(opt))
    backward(model, 0)
    refused(RuntimeError, "DistributedDataParallel", lambda: opt.step_parameter(next(model.parameters())))


@case("FSDP1, gradients only", 2)
def _() -> None:
    model = FSDP(net(), device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
    opt = Prodigy(model.parameters(), d0=D0)
    refused(RuntimeError, "FSDP1", lambda: prodigy_fused.enable_gradient_release(opt))
    compare(model, opt)


@case("FSDP1, ShardedGradScaler", 2)
def _() -> None:
    """An infinity on one rank: all skip the step, and the scales stay equal."""
    model = FSDP(net(torch.float32), device_id=torch.device("cpu"))
    opt = Prodigy(model.parameters(), d0=D0, fused=False)
    scaler = ShardedGradScaler(device="cpu", init_scale=4.0, growth_interval=3)
    for t in range(6):
        backward(model, t, torch.float32)
        for p in model.parameters():
            p.grad *= scaler.scale(torch.ones(())).item()
            if t == 2 and dist.get_rank() == 1:
                p.grad[0] = torch.inf
        scaler.step(opt)
        scaler.update()
        equal_on_all_ranks((scaler.get_scale(), opt.d.hex(), opt.step_count))
    assert (opt.step_count, scaler.get_scale()) == (5, 4.0)


@case("parts that nobody is told of", 2)
def _() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns

    model = net()
    opt = ZeroRedundancyOptimizer(model.parameters(), Prodigy, d0=D0)
    backward(model, 0)
    refused(RuntimeError, "fsdp_in_use=True", opt.step)
    own = fsdp2(net(), mesh=DeviceMesh("cpu", [dist.get_rank()]))  # a stage with a mesh of its own
    backward(own, 0)
    refused(RuntimeError, "process_group=", Prodigy(own.parameters(), d0=D0).step)


@case("process groups that are not", 2)
def _() -> None:
    model = fsdp2(net())
    params = list(model.parameters())
    refused(TypeError, "process_group must be a ProcessGroup", lambda: Prodigy(params, process_group=[0, 1]))
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    refused(ValueError, "process_group", lambda: Prodigy(params, process_group=groups[1 - rank]))
    opt = Prodigy(params, d0=D0, process_group=groups[rank])
    backward(model, 0)
    refused(ValueError, "process_group has the ranks", opt.step)
    assert not opt.state
    opt.process_group = dist.group.WORLD
    opt.step()
    equal_on_all_ranks(opt.d.hex())


@case("HSDP, with one of its dimensions", 4)
def _() -> None:
    mesh = mesh2d()
    model = fsdp2(net(), mesh=mesh)
    backward(model, 0)
    refused(ValueError, "of HSDP, those of the whole mesh", Prodigy(model.parameters(), process_group=mesh["tp"]).step)


@case("a group that comes later", 2)
def _() -> None:
    def parts(model: Net) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return list(model.blocks.parameters()), [*model.emb.parameters(), *model.head.parameters()]

    sharded, alone = fsdp2(net()), net()
    opt, theirs = Prodigy(parts(sharded)[0], d0=D0), Prodigyopt(parts(alone)[0], d0=D0)
    for t in range(STEPS):
        if t == 3:
            running = {name: value for name, value in theirs.param_groups[0].items() if name != "params"}
            opt.add_param_group({"params": parts(sharded)[1]})
            theirs.add_param_group({"params": parts(alone)[1], **running})
        backward(sharded, t)
        backward(alone, t)
        opt.step()
        theirs.step()
        equal_on_all_ranks(opt.d.hex())
    assert abs(opt.d / theirs.d - 1) < 1e-11 and theirs.d > D0
    close(whole(sharded), whole(alone))
