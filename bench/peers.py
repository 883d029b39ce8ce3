"""Who takes part: every optimizer as a row of one table. Who is missing or fails is listed with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import compiled_foreach
import torch
from roofline import adamw_bytes, prodigy_bytes

from prodigy_fused import Prodigy, backends
from prodigy_fused.low_precision import mode_of
from prodigy_fused.state import state_dtype

Make = Callable[[Any], Any]
# The yardstick of every ratio: it runs in every heat.
ANCHOR = "AdamW(fused)"
COPY, IN_PLACE = "copy", "in place"
# Never measured: written to be read, or for the tests.
SLOW_BACKENDS = ("reference", "emulated", compiled_foreach.NAME)


@dataclass(frozen=True, eq=False)
class Peer:
    """An optimizer and how to make it."""

    name: str
    make: Make  # of a list of parameters; raises where it cannot
    package: str = "torch"  # whose version is noted
    count: Callable[[torch.dtype], float] | None = None  # bytes moved per parameter, if known
    tensors: int = 5  # of parameter size that it keeps, parameters included; for the memory a heat needs
    spare: int = 0  # of parameter size that a step allocates on top
    slice_p: int = 1
    most_tensors: dict[str, int] | None = None  # by device type: with more a step, or a compilation, takes minutes
    scans: bool = False  # takes part in the scan over sizes
    trains: bool = True  # takes part in the training of the demo's GPT

    def unfit(self, tensors: int, device: torch.device) -> str | None:
        """Why the peer is not measured on so many tensors."""
        most = (self.most_tensors or {}).get(device.type, tensors)
        return None if tensors <= most else f"not on more than {most} tensors: it would take minutes"


def imported(module: str, name: str, **options: Any) -> Make:
    """Makes `name` of `module`, which is imported only then."""
    return lambda params: getattr(importlib.import_module(module), name)(params, **options)


def adamw(**options: Any) -> Make:
    return lambda params: torch.optim.AdamW(params, lr=1e-6, **options)


def ours(backend: str, **options: Any) -> Make:
    return lambda params: Prodigy(params, backend=backend, **options)


def optimi(params: Any) -> Any:
    """Its Triton kernels where there is a GPU, else what it chooses."""
    triton = True if params[0].is_cuda else None
    return importlib.import_module("optimi").AdamW(params, lr=1e-6, triton=triton)


@cache
def fused_backends(device: torch.device) -> tuple[str, ...]:
    """Our one-pass backends that can take a float32 tensor on `device`, best first."""
    p = torch.zeros(1, device=device)
    group = Prodigy([p], fused=False).param_groups[0]
    names = [name for name in backends.NAMES if name not in (*SLOW_BACKENDS, "foreach")]
    return tuple(name for name in names if backends.load(name).unsupported(p, group) is None)


def adam_bytes(dtype: torch.dtype) -> float:
    """torch's and apex's AdamW: state has the parameter's dtype."""
    return adamw_bytes(dtype.itemsize, dtype.itemsize)


def our_bytes(dtype: torch.dtype, **options: Any) -> float:
    """Ours with these options: a displacement and the dtype of the state follow from them."""
    group = {"slice_p": 1, "low_precision": None, "state_dtype": torch.float32, **options}
    p = torch.empty(0, dtype=dtype)
    state = state_dtype(p, group).itemsize
    return prodigy_bytes(dtype.itemsize, state, group["slice_p"], mode_of(p, group) == "displacement")


def variants(name: str, dtype: torch.dtype) -> list[Peer]:
    """A backend of ours with options that change how many bytes a step moves."""
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
    """Our backends on this device; the best of them in its variants, too."""
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
    """Everybody else; plain Prodigy with default betas where a package has variants."""
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
    """Those whose point is that bfloat16 parameters learn."""
    torchao = imported("torchao.optim", "_AdamW", lr=1e-6, bf16_stochastic_round=True)
    return [Peer("torchao AdamW, stochastic", torchao, "torchao", tensors=3, most_tensors={"cpu": 20, "cuda": 150})]


def table(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Peer]:
    """All peers on a device, in the order of their turns: first those that should meet in one heat."""
    peers = [*own(device, dtype), *others(), *(of_bfloat16() if dtype == torch.bfloat16 else [])]
    return sorted(peers, key=lambda peer: not peer.scans)


class Copier:
    """The physical limit, in turn with the optimizers: a fixed large buffer copied, or scaled where it is.

    On a CPU a copy also reads the lines that it is about to overwrite; scaling in place, as an optimizer does, not.
    """

    def __init__(self, name: str, elements: int, device: torch.device) -> None:
        self.bytes = 8 * elements  # read and written
        self.source = torch.ones(elements, device=device)
        self.target = torch.empty_like(self.source) if name == COPY else None

    def step(self) -> None:
        if self.target is None:
            self.source.neg_()
        else:
            self.target.copy_(self.source)
