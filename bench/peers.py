"""The table of optimizers under test. One that is not installed, or fails, is reported with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from roofline import adamw_bytes, prodigy_bytes
from torch import nn

from prodigy_fused import Prodigy, backends

Make = Callable[[Any], Any]
# All ratios are relative to it; it runs in every heat.
ANCHOR = "AdamW(fused)"
COPY, IN_PLACE = "copy", "in place"


@dataclass(frozen=True, eq=False)
class Peer:
    """An optimizer and how to make it."""

    name: str
    make: Make  # of a list of parameters; raises where it cannot
    package: str = "torch"  # whose version is noted
    count: Callable[[torch.dtype], float] | None = None  # bytes moved per parameter by a step, if known
    tensors: int = 5  # of the parameters' size that it keeps, the parameters included: for the memory a heat needs
    spare: int = 0  # of the parameters' size that a step allocates in addition
    slice_p: int = 1
    most_tensors: dict[str, int] | None = None  # by device type: with more a step, or a compilation, takes minutes
    scans: bool = False  # takes part in the scan over sizes
    trains: bool = True  # takes part in the training of the demo's GPT

    def unfit(self, tensors: int, device: torch.device) -> str | None:
        """Returns why the peer is not measured on so many tensors; None if it is."""
        most = (self.most_tensors or {}).get(device.type, tensors)
        return None if tensors <= most else f"not on more than {most} tensors: it would take minutes"


def imported(module: str, name: str, **options: Any) -> Make:
    """Returns a function that makes `name` of `module`, and imports the module only when called."""
    return lambda params: getattr(importlib.import_module(module), name)(params, **options)


def adamw(**options: Any) -> Make:
    """Returns a function that makes torch's AdamW."""
    return lambda params: torch.optim.AdamW(params, lr=1e-6, **options)


def ours(backend: str, **options: Any) -> Make:
    """Returns a function that makes our optimizer on a backend."""
    return lambda params: Prodigy(params, backend=backend, **options)


def optimi(params: Any) -> Any:
    """Makes optimi's AdamW, with its Triton kernels where there is a GPU."""
    triton = True if params[0].is_cuda else None
    return importlib.import_module("optimi").AdamW(params, lr=1e-6, triton=triton)


@cache
def fused_backends(device: torch.device) -> tuple[str, ...]:
    """Returns the names of our compiled backends that can take a float32 tensor on `device`, best first."""
    p = torch.zeros(1, device=device)
    group = Prodigy([p], fused=False).param_groups[0]
    return tuple(name for name in backends.compiled() if backends.get(name).unsupported(p, group) is None)


def adam_bytes(dtype: torch.dtype) -> float:
    """Returns the bytes per parameter of torch's and apex's AdamW, whose state has the parameter's dtype."""
    return adamw_bytes(dtype.itemsize, dtype.itemsize)


def our_bytes(dtype: torch.dtype, **options: Any) -> float:
    """Returns the bytes per parameter of our optimizer with these options, given the state that it then keeps."""
    p = nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = Prodigy([p], fused=False, **options)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state, slice_p = optimizer.state[p], optimizer.param_groups[0]["slice_p"]
    return prodigy_bytes(dtype.itemsize, state["exp_avg_sq"].itemsize, slice_p, "delta" in state)


def variants(name: str, dtype: torch.dtype) -> list[Peer]:
    """Returns peers of one of our backends with options that change how many bytes a step moves."""
    options: dict[str, tuple[dict[str, Any], int]]  # and how many tensors are kept
    options = {"slice_p=11": ({"slice_p": 11}, 4)}
    if dtype.itemsize == 2:
        options["displacement"] = {"low_precision": "displacement"}, 6
        options["bfloat16 state"] = {"state_dtype": torch.bfloat16}, 5
    return [
        Peer(
            f"prodigy_fused({name}, {what})", ours(name, **given), "prodigy-fused", partial(our_bytes, **given),
            tensors, slice_p=given.get("slice_p", 1),
        )
        for what, (given, tensors) in options.items()
    ]  # fmt: skip


def own(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    """Returns our backends on this device as peers; the best of them with its variants."""
    names = fused_backends(device)
    fused = [
        Peer(f"prodigy_fused({name})", ours(name), "prodigy-fused", our_bytes, scans=True, trains=name == names[0])
        for name in names
    ]
    varied = [peer for name in names[:1] for peer in variants(name, dtype)]
    compiled = imported("compiled_foreach", "make")
    return [
        *fused,
        *varied,
        Peer("prodigy_fused(foreach)", ours("foreach"), "prodigy-fused", spare=1),
        Peer("compiled foreach", compiled, most_tensors={"cpu": 20, "cuda": 150}, trains=False),
    ]


def others() -> list[Peer]:
    """Returns all other peers. Where a package has variants of Prodigy: the plain one, with default betas."""
    plain = {
        "use_schedulefree": False, "factored": False, "split_groups": False, "use_stableadamw": False,
        "d_limiter": False, "betas": (0.9, 0.999),
    }  # fmt: skip
    schedule_free = imported("prodigyplus", "ProdigyPlusScheduleFree", **plain)
    return [
        Peer(ANCHOR, adamw(fused=True), count=adam_bytes, tensors=3, scans=True),
        Peer("AdamW(foreach)", adamw(foreach=True), tensors=3, spare=1),
        Peer("AdamW(for-loop)", adamw(foreach=False), tensors=3),
        Peer("optimi AdamW", optimi, "torch-optimi", tensors=3, spare=1),
        Peer("apex FusedAdam", imported("apex.optimizers", "FusedAdam", lr=1e-6), "apex", adam_bytes, tensors=3),
        Peer("prodigyopt", imported("prodigyopt", "Prodigy"), "prodigyopt", scans=True),
        Peer("pytorch_optimizer Prodigy", imported("pytorch_optimizer", "Prodigy"), "pytorch_optimizer", spare=1),
        # It samples every 11th element and offers no other number.
        Peer("prodigy-plus-schedule-free", schedule_free, "prodigy-plus-schedule-free", tensors=4, slice_p=11),
        Peer("adv_optm Prodigy", imported("adv_optm", "Prodigy_adv", slice_p=1), "adv-optm"),
    ]


def of_bfloat16() -> list[Peer]:
    """Returns further peers for bfloat16 parameters."""
    torchao = imported("torchao.optim", "_AdamW", lr=1e-6, bf16_stochastic_round=True)
    return [Peer("torchao AdamW, stochastic", torchao, "torchao", tensors=3, most_tensors={"cpu": 20, "cuda": 150})]


def table(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Peer]:
    """Returns all peers on a device in the order of their turns: those of the scan first, so that they share a heat."""
    peers = [*own(device, dtype), *others(), *(of_bfloat16() if dtype == torch.bfloat16 else [])]
    return sorted(peers, key=lambda peer: not peer.scans)


class Copier:
    """The physical limit, in turn with the optimizers: a fixed large buffer, copied or negated in place.

    On a CPU a copy also reads the cache lines that it is about to overwrite. Work in place, such as an optimizer's,
    does not.
    """

    def __init__(self, name: str, elements: int, device: torch.device) -> None:
        self.bytes = 8 * elements  # read and written
        self.source = torch.ones(elements, device=device)
        self.target = torch.empty_like(self.source) if name == COPY else None

    def step(self) -> None:
        """Copies the buffer, or negates it."""
        if self.target is None:
            self.source.neg_()
        else:
            self.target.copy_(self.source)
