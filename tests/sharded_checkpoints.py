"""The cases of test_sharding.py that save in one layout and go on in another."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracle import Prodigyopt
from sharded import (
    D0,
    OPTIONS,
    STEPS,
    WAYS,
    close,
    equal_on_all_ranks,
    fsdp2,
    net,
    same_numbers,
    train,
    two_dimensional,
    whole,
)
from sharded_cases import case
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from prodigy_fused import Prodigy
from prodigy_fused.dtensor import local

FLOAT = torch.float32
MORE = range(STEPS, STEPS + 4)
FULL = StateDictOptions(full_state_dict=True)


def alone(options: dict[str, Any]) -> tuple[list[Any], nn.Module, Prodigyopt]:
    """The reference's run, from the start to the end; what it was in between is in the model and the optimizer."""
    model = net()
    opt = Prodigyopt(model.parameters(), d0=D0, **options)
    train(model, opt)
    there, saved = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
    numbers = train(model, opt, MORE)
    between = Prodigyopt(there.parameters(), d0=D0, **options)
    between.load_state_dict(saved)
    return [numbers, whole(model)], there, between


def goes_on(model: nn.Module, opt: Any, wanted: list[Any]) -> None:
    same_numbers(train(model, opt, MORE), wanted[0])
    close(whole(model), wanted[1])


def move(model: nn.Module, opt: Prodigy, to: nn.Module, other: Prodigy) -> None:
    """From any layout to any other, by a full state dict."""
    states = get_model_state_dict(model, options=FULL), get_optimizer_state_dict(model, opt, options=FULL)
    everyone = [states if dist.get_rank() == 0 else None]  # only rank 0 has it
    dist.broadcast_object_list(everyone, src=0)
    assert everyone[0] is not None
    set_model_state_dict(to, everyone[0][0], options=FULL)
    set_optimizer_state_dict(to, other, everyone[0][1], options=FULL)


@case("full state dict", 2)
def _() -> None:
    """Of FSDP2, to tensor parallel, to other shards, to a run on one rank, and to the reference."""
    for options in OPTIONS.values():
        wanted, _, _ = alone(options)
        models = [*(WAYS[way](net()) for way in ("FSDP2", "TP+SP", "FSDP2 by columns")), net()]
        opts = [Prodigy(model.parameters(), d0=D0, **options) for model in models]
        train(models[0], opts[0])
        for i in range(3):
            move(models[i], opts[i], models[i + 1], opts[i + 1])
        reference = copy.deepcopy(models[3])
        theirs = Prodigyopt(reference.parameters(), d0=D0, **options)
        theirs.load_state_dict(copy.deepcopy(opts[3].state_dict()))
        for model, opt in zip([*models, reference], [*opts, theirs], strict=True):
            goes_on(model, opt, wanted)


@case("a checkpoint of the reference", 2)
def _() -> None:
    for options in OPTIONS.values():
        wanted, there, theirs = alone(options)
        for way in ("FSDP2", "FSDP2 by columns", "TP"):
            model = WAYS[way](net())
            set_model_state_dict(model, there.state_dict(), options=FULL)
            opt = Prodigy(model.parameters(), d0=D0, **options)
            opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
            goes_on(model, opt, wanted)


@case("8 bits", 2)
def _() -> None:
    """Blocks are each rank's own: results agree within their rounding; to and from other layouts numbers are kept."""
    for options in OPTIONS.values():
        options = {"state_dtype": "8bit", "min_8bit_size": 1, "d0": D0, **options}
        model, moved, again = WAYS["FSDP2"](net(FLOAT)), WAYS["FSDP2 by columns"](net(FLOAT)), WAYS["FSDP2"](net(FLOAT))
        opt, other, third = (Prodigy(each.parameters(), **options) for each in (model, moved, again))
        single = net(FLOAT)
        numbers = train(single, Prodigy(single.parameters(), **options), dtype=FLOAT)
        got = train(model, opt, dtype=FLOAT)
        equal_on_all_ranks(got)
        assert numbers[-1][0] > 2 * D0 and abs(got[-1][0] / numbers[-1][0] - 1) < 0.1
        assert all(opt.state[p]["exp_avg"].dtype == torch.uint8 for p in model.parameters() if local(p).numel())
        move(model, opt, moved, other)
        move(moved, other, again, third)
        states = [get_optimizer_state_dict(*pair, options=FULL) for pair in ((model, opt), (again, third))]
        for name, state in states[0].get("state", {}).items():
            for key, value in state.items():
                assert key == "step" or torch.equal(value, states[1]["state"][name][key]), (name, key)
        traces = [train(*pair, MORE, FLOAT) for pair in ((model, opt), (moved, other), (again, third))]
        assert traces[2] == traces[0] and abs(traces[1][-1][0] / traces[0][-1][0] - 1) < 0.1
        close(whole(again), whole(model), 0.0)


@case("8 bits on some ranks only", 2)
def _() -> None:
    """Of an uneven shard, one rank's elements are enough for codes, and the other's are not. Both save the same."""
    torch.manual_seed(0)
    model, again = (fully_shard(nn.Sequential(nn.Linear(40, 3, bias=False), nn.Linear(3, 1))) for _ in range(2))
    options = {"state_dtype": "8bit", "min_8bit_size": 60, "d0": D0}
    opt, other = (Prodigy(each.parameters(), **options) for each in (model, again))
    p = next(iter(model.parameters()))
    for t in range(3):
        for q in model.parameters():
            q.grad = distribute_tensor(torch.full(q.shape, 1.0 + t), q.device_mesh, q.placements)
        opt.step()
    assert opt.state[p]["exp_avg"].dtype == (FLOAT if dist.get_rank() else torch.uint8)
    move(model, opt, again, other)
    mine, its = (get_optimizer_state_dict(*each, options=FULL) for each in ((model, opt), (again, other)))
    for name, state in mine.get("state", {}).items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "s", "p0", "delta"}
        for key, value in state.items():
            assert key == "step" or torch.equal(value, its["state"][name][key]), (name, key)


@case("a state dict in its own layout", 2)
def _() -> None:
    for options in OPTIONS.values():
        wanted, _, _ = alone(options)
        model = WAYS["FSDP2"](net())
        opt, other = (Prodigy(model.parameters(), d0=D0, **options) for _ in range(2))
        train(model, opt)
        saved = copy.deepcopy(opt.state_dict())
        for p, state in zip(model.parameters(), saved["state"].values(), strict=True):
            assert state["p0"].shape == state["s"].shape == p.shape
            # Whatever this rank's elements are: on rank 0 those of the head's bias are all zero.
            assert opt.state[p]["p0"].numel() == opt.state[p]["s"].numel()
        other.load_state_dict(saved)
        goes_on(model, other, wanted)


@case("files, 2 to 4 to 1", 4)
def _() -> None:
    """torch.distributed.checkpoint, from FSDP2 on 2 ranks to FSDP2 + TP on 4, and to FSDP2 on 1."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    assert folder[0] is not None
    two, one = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [3])  # all ranks take part in this
    for name, options in OPTIONS.items():
        wanted, _, _ = alone(options)
        first, second = os.path.join(folder[0], name, "2"), os.path.join(folder[0], name, "4")
        if dist.get_rank() < 2:
            model = fsdp2(net(), mesh=two)
            opt = Prodigy(model.parameters(), d0=D0, process_group=two, **options)
            train(model, opt)
            dcp.save(_states(model, opt), checkpoint_id=first, process_group=two.get_group())
        dist.barrier()
        model = two_dimensional(net(), sequence=False)
        opt = Prodigy(model.parameters(), d0=D0, **options)
        _load(model, opt, first)
        dcp.save(_states(model, opt), checkpoint_id=second)
        goes_on(model, opt, wanted)
        if dist.get_rank() == 3:
            model = fsdp2(net(), mesh=one)
            opt = Prodigy(model.parameters(), d0=D0, process_group=one, **options)
            _load(model, opt, second, process_group=one.get_group())
            goes_on(model, opt, wanted)
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def _states(model: nn.Module, opt: Prodigy) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}


def _load(model: nn.Module, opt: Prodigy, where: str, **options: Any) -> None:
    states = _states(model, opt)
    dcp.load(states, checkpoint_id=where, **options)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, opt, states["optimizer"])
