"""Short runs over tensors around the size of a chunk, for tests of GPU kernels that the CPU runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodigy_fused import Prodigy

OPTIONS = {
    "default": {},
    "no momentum": {"betas": (0.0, 0.99), "use_bias_correction": True},
    "sampled": {"slice_p": 3, "weight_decay": 0.1},
}


def values(sizes: list[int], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=draw, dtype=torch.float64).to(dtype) * 3.0 ** (i % 5) for i, n in enumerate(sizes)]


def start(
    name: str, sizes: list[int], dtype: Any = torch.float64, each_its_group: bool = False, **options: Any
) -> Prodigy:
    params = [nn.Parameter(x) for x in values(sizes, 0, dtype)]
    groups = [{"params": p, "lr": 1 / (1 + i % 7)} for i, p in enumerate(params)] if each_its_group else params
    return Prodigy(groups, backend=name, d0=1e-3, **options)


def params(opt: Prodigy) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def train(opt: Prodigy, steps: int = 4, first: int = 0) -> Prodigy:
    for k in range(first, first + steps):
        xs = params(opt)
        for p, g in zip(xs, values([p.numel() for p in xs], 1 + k, xs[0].dtype), strict=True):
            p.grad = 0.02 * g.view(p.shape) + 1  # a drift, so that d grows
        opt.step()
    return opt


def agree(a: Prodigy, b: Prodigy, tolerance: float = 1e-12) -> None:
    assert a.d == pytest.approx(b.d, rel=tolerance)
    for p, q in zip(params(a), params(b), strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance)


def at_offset(t: Tensor, offset: int) -> Tensor:
    """``t`` in the middle of other memory."""
    return torch.cat([t.new_full((offset,), 7.25), t, t.new_full((3,), 7.25)])[offset : offset + t.numel()]
