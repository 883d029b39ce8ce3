"""Prints a hash of d, the state and the parameters after 50 steps, for every backend and option set.

For changes that must not change a bit: run ``python tests/bits.py > FILE`` on both commits, on the same machine, and
compare the two files. (Hashes are not comparable between machines: torch's own operations, on which ``foreach`` and
``reference`` rest, depend on the instruction set.)
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent / "emulation")]

import emulated
import interpreted
import torch
from torch import Tensor, nn

from prodigy_fused import Prodigy, backends

emulated.register()
interpreted.register()


STEPS = 50
# Triton's interpreter is slow: fewer steps, and one tensor of several chunks is left out.
FEW_STEPS, SLOW = 10, {"triton"}
SHAPES = ((40, 30), (7,), (), (2, 3, 4, 5), (0,), (1023,), (70_001,))
ZERO, NHWC, LARGE = 1, 3, 6

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.1, "use_bias_correction": True},
    "coupled decay": {"weight_decay": 0.1, "decouple": False},
    "safeguard": {"safeguard_warmup": True, "d_coef": 0.5, "growth_rate": 1.02},
    "no momentum": {"betas": (0.0, 0.99), "use_bias_correction": True, "weight_decay": 0.01},
    "beta3": {"beta3": 0.0, "weight_decay": 0.3, "eps": 1e-3},
    "sampled": {"slice_p": 3},
    "sampled widely": {"slice_p": 11, "weight_decay": 0.01, "d0": 1e-6},
    "maximize": {"maximize": True},
    "bounded": {"d_limit": 4e-3},
    "frozen": {"prodigy_steps": 5, "weight_decay": 0.01},
    "frozen, sampled": {"prodigy_steps": 5, "slice_p": 3},
}
DTYPES: dict[str, list[dict[str, Any]]] = {
    "float64": [{}],
    "float32": [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": "8bit", "min_8bit_size": 1}],
    "bfloat16": [
        {"low_precision": "stochastic"},
        {},
        {"low_precision": "displacement"},
        {"low_precision": "nearest"},
        {"state_dtype": None},
    ],
    "float16": [{}, {"low_precision": "stochastic", "state_dtype": torch.bfloat16}],
}
# Events in the gradients, the groups and the scaler in step k; each is run once, in float32 and bfloat16.
EVENTS = (
    "plain", "groups", "late", "NaN", "zeros first", "grad_scale", "lr 0", "warm-up", "float32 gradients",
    "mixed slice_p", "mixed dtypes", "split groups",
)  # fmt: skip


def parameters(dtype: torch.dtype, large: bool) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
    values[ZERO].zero_()
    values[NHWC] = values[NHWC].to(memory_format=torch.channels_last)
    return [nn.Parameter(v.to(dtype)) for i, v in enumerate(values) if large or i != LARGE]


def gradients(params: list[nn.Parameter], k: int, event: str) -> list[Tensor | None]:
    draw = torch.Generator().manual_seed(1000 + k)
    grads: list[Tensor | None] = []
    for i, p in enumerate(params):
        # Towards zero, and noise: of the parameter itself, so that one different bit soon changes all of them.
        g = (0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64) + p.detach().double()) * 3.0 ** (i % 3 - 1)
        if event == "NaN" and k in (4, 20) and g.numel():
            g.view(-1)[-1] = math.nan
        if event == "zeros first" and k < 3:
            g.zero_()
        if event == "grad_scale":
            g *= 1024
        wide = event == "float32 gradients" and p.dtype in (torch.bfloat16, torch.float16)
        grads.append(None if event == "late" and k < 5 * (i % 4) else g.to(torch.float32 if wide else p.dtype))
    return grads


def run(backend: str, dtype: torch.dtype, event: str, options: dict[str, Any]) -> str:
    params: Any = parameters(dtype, large=backend not in SLOW)
    groups = params
    if event == "mixed slice_p":
        groups = [{"params": params[i::3], "slice_p": slice_p} for i, slice_p in enumerate((1, 3, 11))]
    if event == "mixed dtypes":
        others = (dtype, torch.float16, torch.float64)
        params = [nn.Parameter(p.detach().to(others[i % 3])) for i, p in enumerate(params)]
        groups = [{"params": params[2::2]}, {"params": params[0:2] + params[3::2], "lr": 0.5}]
    if event == "split groups":
        options = {**options, "split_groups": True}
    if event in ("groups", "split groups"):
        groups = [
            {"params": params[0::3]},
            {"params": params[1::3], "lr": 0.5, "weight_decay": 0.02},
            {"params": params[2::3], "eps": 1e-5, "lr": 0.0},
        ]
    opt = Prodigy(groups, backend=backend, **{"d0": 1e-3, **options})
    for k in range(FEW_STEPS if backend in SLOW else STEPS):
        for p, g in zip(params, gradients(params, k, event), strict=True):
            if g is not None and g.dtype != p.dtype:
                p.grad_dtype = None
            p.grad = g
        if event == "warm-up" or (event == "lr 0" and 5 <= k < 8):
            opt.param_groups[0]["lr"] = k / 20 if event == "warm-up" else 0.0
        elif event == "lr 0":
            opt.param_groups[0]["lr"] = 1.0
        if event == "grad_scale":
            opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(float(k == 6))
        opt.step()
    return digest(opt, params)


def digest(opt: Prodigy, params: list[nn.Parameter]) -> str:
    names = ("d", "k", "nonfinite_steps", "corrections")
    estimates = opt.param_groups if opt.param_groups[0]["split_groups"] else opt.param_groups[:1]
    total = hashlib.sha256("".join(repr(tuple(group[name] for name in names)) for group in estimates).encode())
    saved = opt.state_dict()
    states = [saved["state"][i] for i in sorted(saved["state"])]
    tensors = [*params, *(t for state in states for key, t in sorted(state.items()) if key != "step")]
    for t in tensors:
        content = torch.cat([torch.as_tensor(t).detach().flatten()])  # a copy, without gaps
        total.update(content.view(torch.uint8).numpy().tobytes())
    return f"{total.hexdigest()[:16]} d={opt.param_groups[0]['d']:.17g}"


def cases() -> list[tuple[torch.dtype, str, dict[str, Any]]]:
    found: list[tuple[torch.dtype, str, dict[str, Any]]] = []
    for name, formats in DTYPES.items():
        dtype = getattr(torch, name)
        for form in formats:
            for options in OPTIONS.values():
                if form.get("low_precision") != "displacement" or options.get("slice_p", 1) == 1:
                    found.append((dtype, "plain", {**options, **form}))
        if name in ("float32", "bfloat16"):
            found += [(dtype, event, {"weight_decay": 0.01}) for event in EVENTS[1:]]
            found.append((dtype, "late", {"slice_p": 3}))
    return found


def main() -> None:
    torch.set_num_threads(2)
    wanted = sys.argv[1:] or backends.names()
    for backend in wanted:
        for dtype, event, options in cases():
            print(
                f"{backend:<10}{str(dtype)[6:]:<9}{event:<18}{options}: {run(backend, dtype, event, options)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
