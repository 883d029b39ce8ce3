"""A few steps of every way to store and to sample, for tools that look at kernels: a profiler, compute-sanitizer.

The profiler is switched on for the last step of each: `ncu --profile-from-start=off python bench/gpu_steps.py`.
"""

from __future__ import annotations

import argparse
import contextlib

import peers
import torch
from torch import nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAILS = (7, 1)  # elements of further tensors, which vectors and chunks do not divide


@contextlib.contextmanager
def profiled(device: torch.device, on: bool):
    """Profiles the kernels of the block, if `on` and on a GPU."""
    on = on and device.type == "cuda"
    if on:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    yield
    if on:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def steps(peer: peers.Peer, device: torch.device, dtype: torch.dtype, elements: int, count: int) -> float:
    """Takes `count` steps; returns d.

    Raises:
        FloatingPointError: a parameter is not finite afterwards.
    """
    torch.manual_seed(0)
    make = {"device": device, "dtype": dtype}
    params = [nn.Parameter(torch.randn(n, **make)) for n in (elements, *TAILS)]
    optimizer = peer.make(params)
    for k in range(count):
        for p in params:
            p.grad = peer.gradients(torch.randn_like(p.detach()), k == 0)
        with profiled(device, k == count - 1):
            optimizer.step()
    if not all(p.isfinite().all() for p in params):
        raise FloatingPointError(f"{peer.name} on {dtype}")
    return float(optimizer.d)


def main(argv: list[str] | None = None) -> None:
    """Takes the steps of the variants of one backend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
    parser.add_argument("--peer", action="append", help="only variants whose name contains this; repeatable")
    parser.add_argument("--elements", type=int, default=9001)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.backend == "cpu" else "cuda")
    for dtype in [getattr(torch, args.dtype)] if args.dtype else DTYPES:
        own = [peer for peer in peers.own(device, dtype) if peer.name.startswith(f"prodigy_fused({args.backend}")]
        own = [peer for peer in own if not args.peer or any(name in peer.name for name in args.peer)]
        if not own:
            parser.error(f"no such backend here, or no such variant of it: {args.backend}, {args.peer}")
        for peer in own:
            d = steps(peer, device, dtype, args.elements, args.steps)
            print(f"{str(dtype).removeprefix('torch.')} {peer.name}: d {d:.3g}", flush=True)


if __name__ == "__main__":
    main()
