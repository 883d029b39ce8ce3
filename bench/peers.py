"""The table of optimizers under test. One that is not installed, or fails, is reported with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import gradients
import torch
from roofline import adamw_bytes, coded_bytes, flash_bytes, prodigy_bytes
from torch import Tensor, nn

from prodigy_fused import Prodigy, backends

Make = Callable[[Any], Any]
# All ratios are relative to it; it runs in every heat.
ANCHOR = "AdamW(fused)"
COPY, IN_PLACE = "copy", "in place"
SAMPLED: dict[str, Any] = {"slice_p": 11}  # float16 is then rounded stochastically
BFLOAT16: dict[str, Any] = {"state_dtype": torch.bfloat16}
STOCHASTIC: dict[str, Any] = {"low_precision": "stochastic"}
CODED: dict[str, Any] = {"state_dtype": "8bit"}
# In every step d moves, by a thousandth: unbounded, it would overflow.
MOVES: dict[str, Any] = {"growth_rate": 1.001}
FROZEN: dict[str, Any] = {"prodigy_steps": 1}


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
    plain: bool = True  # takes part in workloads that are nothing special
    scans: bool = False  # takes part in the scan over sizes
    policies: bool = False  # takes part where all ways to store and to sample race
    trains: bool = True  # takes part in the training of the demo's GPT
    gpu: bool = False  # runs on one only
    gradients: Callable[[Tensor, bool], Tensor] = gradients.normal  # what it makes of the numbers drawn

    @property
    def moves(self) -> bool:
        """Whether d is to move in each of its steps; it is to rest in those of all others."""
        return self.gradients is gradients.positive

    def unfit(self, tensors: int, device: torch.device) -> str | None:
        """Returns why the peer is not measured on so many tensors; None if it is."""
        if self.gpu and device.type != "cuda":
            return "it needs a GPU"
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


def flash(params: Any) -> Any:
    """Makes FlashOptim's AdamW, with 24 bits of each 16-bit parameter; with float32 ones it takes no such option."""
    bits = 24 if params[0].itemsize == 2 else None
    return importlib.import_module("flashoptim").FlashAdamW(params, lr=1e-6, master_weight_bits=bits)


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
    optimizer = Prodigy([p], fused=False, **options, min_8bit_size=1)
    for _ in range(2):  # the second freezes an estimate that takes one step
        p.grad = torch.ones_like(p)
        optimizer.step()
    state, slice_p = optimizer.state[p], optimizer.param_groups[0]["slice_p"]
    beside = sum(state[key].itemsize for key in ("delta", "low") if key in state)
    if state["exp_avg_sq"].dtype == torch.uint8:
        return coded_bytes(dtype.itemsize, slice_p, beside)
    traits = {"frozen": "s" not in state, "moves": options.items() >= MOVES.items()}
    return prodigy_bytes(dtype.itemsize, state["exp_avg_sq"].itemsize, slice_p, beside, **traits)


def storages(dtype: torch.dtype) -> dict[str, tuple[dict[str, Any], int]]:
    """Returns the ways to store state that are not the default: options, and how many tensors are kept."""
    found: dict[str, tuple[dict[str, Any], int]] = {"bfloat16 state": (BFLOAT16, 5)}
    if dtype != torch.float64:
        found["8-bit state"] = CODED, 2
        found["8-bit state, slice_p=11"] = CODED | SAMPLED, 2
    if dtype == torch.bfloat16:
        found["displacement"] = {"low_precision": "displacement"}, 6
    if dtype.itemsize == 2:
        found["stochastic"] = STOCHASTIC, 5
    return found


def variants(name: str, dtype: torch.dtype, plain: bool) -> list[Peer]:
    """Returns peers of one of our backends with options that change what a step moves or computes.

    Args:
        plain: the most important ones also take part in workloads that are nothing special.
    """

    def variant(what: str, options: dict[str, Any], tensors: int = 5, everywhere: bool = False, **more: Any) -> Peer:
        return Peer(
            f"prodigy_fused({name}, {what})", ours(name, **options), "prodigy-fused", partial(our_bytes, **options),
            tensors, slice_p=options.get("slice_p", 1), plain=plain and everywhere, policies=True, trains=everywhere,
            **more,
        )  # fmt: skip

    half = dtype.itemsize == 2
    found = [variant("slice_p=11", SAMPLED, 4, everywhere=True)]
    found += [variant(what, how, tensors, everywhere=half) for what, (how, tensors) in storages(dtype).items()]
    if dtype == torch.bfloat16:  # without the eight bits that are kept beside it by default
        more = {"slice_p=11": SAMPLED, "bfloat16 state": BFLOAT16, "bfloat16 state, slice_p=11": BFLOAT16 | SAMPLED}
        found += [variant(f"stochastic, {what}", STOCHASTIC | how) for what, how in more.items()]
    return [
        *found,
        variant("bfloat16 state, slice_p=11", BFLOAT16 | SAMPLED),
        variant("frozen", FROZEN),
        variant("d moves", MOVES, gradients=gradients.positive),
        variant("zero gradients", {}, gradients=gradients.zero),
    ]


def own(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    """Returns our backends on this device as peers, with their variants."""
    names = fused_backends(device)
    fused = [
        Peer(
            f"prodigy_fused({name})", ours(name), "prodigy-fused", our_bytes, scans=True, policies=True,
            trains=name == names[0],
        )
        for name in names
    ]  # fmt: skip
    varied = [peer for name in names for peer in variants(name, dtype, plain=name == names[0])]
    compiled = imported("compiled_foreach", "make")
    plain, moving = {"package": "prodigy-fused", "policies": True, "spare": 1}, gradients.positive
    return [
        *fused,
        *varied,
        Peer("prodigy_fused(foreach)", ours("foreach"), **plain),
        Peer("prodigy_fused(foreach, d moves)", ours("foreach", **MOVES), plain=False, gradients=moving, **plain),
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
        Peer(ANCHOR, adamw(fused=True), count=adam_bytes, tensors=3, scans=True, policies=True),
        Peer("AdamW(foreach)", adamw(foreach=True), tensors=3, spare=1, policies=True),
        Peer("AdamW(for-loop)", adamw(foreach=False), tensors=3),
        Peer("optimi AdamW", optimi, "torch-optimi", tensors=3, spare=1),
        Peer("apex FusedAdam", imported("apex.optimizers", "FusedAdam", lr=1e-6), "apex", adam_bytes, tensors=3),
        Peer(
            "FlashOptim AdamW",
            flash,
            "flashoptim",
            lambda dtype: flash_bytes(dtype.itemsize),
            tensors=3,
            gpu=True,
            policies=True,
            trains=False,
        ),
        Peer("prodigyopt", imported("prodigyopt", "Prodigy"), "prodigyopt", scans=True, policies=True),
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
