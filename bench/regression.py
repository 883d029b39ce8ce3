"""Least squares for a matrix that starts close to its solution, as in fine-tuning: a problem on which a bfloat16
parameter of the reference never moves."""

from __future__ import annotations

from typing import Any

import torch

from prodigy_fused import Prodigy

# The start x0, by kind, computed from normal random numbers.
START = {"weights": lambda w: w.sign() * (0.02 + 0.05 * w.abs()), "norms": torch.ones_like}


def regression(
    kind: str, dtype: torch.dtype = torch.float32, steps: int = 500, seed: int = 0, **options: Any
) -> tuple[float, float]:
    """Trains and returns d, and the share of the elements that have moved.

    Args:
        kind: of the start, a key of START.
        dtype: of the parameter.
        options: of the optimizer.
    """
    draw = torch.Generator().manual_seed(seed)
    x0 = START[kind](torch.randn(256, 256, generator=draw)).bfloat16()
    solution = x0 + 0.02 * torch.randn(x0.shape, generator=draw)
    p = torch.nn.Parameter(x0.to(dtype, copy=True))
    opt = Prodigy([p], **options)
    for _ in range(steps):
        inputs = torch.randn(32, 256, generator=draw)
        p.grad = (inputs.T @ (inputs @ (p.detach().float() - solution)) / 32).to(dtype)
        opt.step()
    return opt.d, (p.detach().float() != x0.float()).float().mean().item()
