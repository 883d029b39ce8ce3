"""What the ranks of test_sharding.py do: a model, the ways to shard it, and the cases. Each case compares a sharded run
with the same run on one rank, which every rank takes for itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from oracle import Prodigyopt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prodigy_fused import Prodigy
from prodigy_fused.dtensor import is_dtensor

# On a CPU, FSDP2 of torch 2.6 calls what streams lack there, and cannot gather a parameter for the backward pass again.
FSDP2_OF_OLD = not hasattr(torch.cpu.Stream, "record_event")
if FSDP2_OF_OLD:
    torch.cpu.Stream.record_event = lambda self, event=None: event or torch.cpu.Event()
    torch.cpu.Stream.wait_event = lambda self, event: None

D0, STEPS, EXACT = 1e-3, 10, 1e-11
NUMBERS = ("d", "d_max", "d_numerator", "k")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks; the head's 5 rows are zero, and so is its bias but for the last element."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.blocks, self.head = nn.Linear(4, 6), nn.ModuleList([Block(), Block()]), nn.Linear(6, 5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.bias.data[-1] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def backward(model: nn.Module, t: int, dtype: torch.dtype = torch.float64) -> None:
    """The gradients of step ``t``; the same data on every rank."""
    generator = torch.Generator().manual_seed(t)
    x, y = (torch.randn(2, 4, n, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 5))
    model.zero_grad()
    (model(x) - y).pow(2).mean().backward()


def train(model: nn.Module, opt: Any, steps: range = range(STEPS), dtype: torch.dtype = torch.float64) -> list[Any]:
    """Returns the numbers of the estimate after each step."""
    trace = []
    for t in steps:
        backward(model, t, dtype)
        opt.step()
        trace.append([float(opt.param_groups[0][name]) for name in NUMBERS])
    return trace


# -- ways to shard -----------------------------------------------------------------------------------------------------


def mesh2d() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def fsdp2(model: Net, **options: Any) -> Net:
    options |= {"reshard_after_forward": False} if FSDP2_OF_OLD else {}
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


TP = {"up": ColwiseParallel(), "down": RowwiseParallel()}
SP = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}


def tensor_parallel(model: Net, mesh: DeviceMesh, sequence: bool = False) -> Net:
    for block in model.blocks:
        parallelize_module(block, mesh, SP if sequence else TP)
    if sequence:
        ends = {
            "emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, ends)
    return model


def world() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("world",))


def two_dimensional(model: Net, sequence: bool) -> Net:
    mesh = mesh2d()
    return fsdp2(tensor_parallel(model, mesh["tp"], sequence), mesh=mesh["dp"])


WAYS: dict[str, Callable[[Net], nn.Module]] = {
    "FSDP2": fsdp2,
    "FSDP2 by columns": lambda model: fsdp2(model, shard_placement_fn=lambda p: Shard(p.dim() - 1)),
    "TP": lambda model: tensor_parallel(model, world()),
    "TP+SP": lambda model: tensor_parallel(model, world(), sequence=True),
    "HSDP": lambda model: fsdp2(model, mesh=mesh2d()),
    "FSDP2+TP": lambda model: two_dimensional(model, sequence=False),
    "FSDP2+TP+SP": lambda model: two_dimensional(model, sequence=True),
}
ONLY_4 = ("HSDP", "FSDP2+TP", "FSDP2+TP+SP")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"slice_p": 3, "weight_decay": 0.1, "betas": (0.9, 0.99), "d_coef": 4.0},
}


# -- comparisons -------------------------------------------------------------------------------------------------------


def whole(model: nn.Module) -> list[Tensor]:
    with FSDP.summon_full_params(model) if isinstance(model, FSDP) else contextlib.nullcontext():
        return [p.detach().full_tensor() if is_dtensor(p) else p.detach().clone() for p in model.parameters()]


def close(got: list[Tensor], wanted: list[Tensor], tolerance: float = EXACT) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        error = (a.view(b.shape) - b).abs().max() / b.abs().max()
        assert error <= tolerance, f"parameter {i} of shape {tuple(b.shape)}: {error:.1e}"


def same_numbers(got: list[Any], wanted: list[Any]) -> None:
    assert wanted[-1][0] > 2 * D0, "d has not grown"
    for t, (a, b) in enumerate(zip(got, wanted, strict=True)):
        for name, x, y in zip(NUMBERS, a, b, strict=True):
            assert abs(x - y) <= EXACT * abs(y), f"{name} of step {t}: {x} instead of {y}"


def equal_on_all_ranks(value: Any) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    assert all(other == everyone[0] for other in everyone), everyone


def compare(model: nn.Module, opt: Prodigy, theirs: Any = None, alone: nn.Module | None = None, **options: Any) -> None:
    """Trains both; ours is sharded, theirs (by default the reference's) is not."""
    alone = net() if alone is None else alone
    theirs = Prodigyopt(alone.parameters(), d0=D0, **options) if theirs is None else theirs
    got = train(model, opt)
    equal_on_all_ranks([[number.hex() for number in numbers] for numbers in got])
    same_numbers(got, train(alone, theirs))
    close(whole(model), whole(alone))


class Collectives(TorchDispatchMode):
    """Notes of each collective its name, and how many bytes this rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            # An output, if it is there, is at least as large.
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.names.append(func.__name__)
            self.sizes.append(min(t.numel() * t.element_size() for t in tensors))
        return func(*args, **(kwargs or {}))
