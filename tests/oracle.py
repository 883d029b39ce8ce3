"""The oracles of the numbers: prodigyopt 1.1.2, and Algorithm 4 once more in numpy for what it cannot do.

Note [open loop]: an oracle trains a real model in float64 and its gradients are recorded; everything under test is
then fed those gradients. Left to train by itself (closed loop), a difference in the last bit grows a thousandfold
in a few hundred steps, and no tolerance would tell a rounding error from a wrong rule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import prodigyopt
import torch
from torch import Tensor, nn

# -- the oracles: used like optimizers, so that one runner drives them and what is tested ------------------------------


class Prodigyopt(prodigyopt.Prodigy):
    """prodigyopt without two defects (docs/algorithm.md, "What correct means"): it moves groups with lr 0, and coupled
    weight decay writes into ``p.grad``. It gets no gradient of the former, and copies for the latter."""

    def __init__(self, params: Any, **options: Any) -> None:
        with contextlib.redirect_stdout(None):
            super().__init__(params, **options)

    def step(self) -> None:
        pairs = [(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        kept = [p.grad for p, _ in pairs]
        for p, lr in pairs:
            p.grad = None if p.grad is None or lr == 0 else p.grad.clone()
        super().step()
        for (p, _), grad in zip(pairs, kept, strict=True):
            p.grad = grad

    @property
    def d(self) -> float:
        return float(self.param_groups[0]["d"])


class Algorithm4:
    """Algorithm 4 line by line, in float64, with each group's own lr, betas and decay, and non-finite gradients."""

    DEFAULTS: dict[str, Any] = {  # noqa: RUF012
        "lr": 1.0, "betas": (0.9, 0.999), "beta3": None, "eps": 1e-8, "weight_decay": 0.0, "decouple": True,
        "use_bias_correction": False, "safeguard_warmup": False, "d0": 1e-6, "d_coef": 1.0,
        "growth_rate": math.inf, "d_limit": math.inf, "slice_p": 1, "maximize": False,
    }  # fmt: skip

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.param_groups = [{**self.DEFAULTS, **options, **group} for group in groups]
        first = self.param_groups[0]
        self.d0, self.d_coef, self.growth_rate = first["d0"], first["d_coef"], first["growth_rate"]
        self.d_limit = first["d_limit"]
        self.beta3 = math.sqrt(first["betas"][1]) if first["beta3"] is None else first["beta3"]
        self.d = self.d_max = self.d0
        self.num, self.k, self.nonfinite_steps = 0.0, 0, 0
        self.state: dict[Tensor, dict[str, Any]] = {}

    def step(self) -> None:
        d, k, dot, den, moves = self.d, self.k, 0.0, 0.0, []
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            bc = math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1)) if group["use_bias_correction"] else 1.0
            dlr = d * lr * bc
            for p in group["params"]:
                if lr == 0 or p.grad is None:
                    continue
                x, g = numpy(p), numpy(p.grad) * (-1 if group["maximize"] else 1)
                if decay and not group["decouple"]:
                    g = g + decay * x
                here = (slice(None, None, group["slice_p"]),)
                state = self.state.setdefault(p, {"x0": x[here], "m": 0 * x, "v": 0 * x, "s": 0 * x[here]})
                with np.errstate(invalid="ignore"):
                    dot += lr * bc * (g[here] * (state["x0"] - x[here])).sum()
                g = np.where(np.isfinite(g), g, 0.0)
                state["m"] = beta1 * state["m"] + (1 - beta1) * d * g
                state["v"] = beta2 * state["v"] + (1 - beta2) * d**2 * g**2
                weight = d / self.d0 * (d if group["safeguard_warmup"] else dlr)
                state["s"] = self.beta3 * state["s"] + weight * g[here]
                den += np.abs(state["s"]).sum()
                moves.append((p, x, g, state, dlr, group))
        if den == 0:
            self.nonfinite_steps += not math.isfinite(dot)
            return

        num = self.beta3 * self.num + d / self.d0 * d * dot
        d_hat = self.d_coef * num / den
        self.k += 1
        if math.isfinite(d_hat):
            self.d_max = max(self.d_max, d_hat)
            grown = (max(d, d_hat) if d == self.d0 else d) * self.growth_rate
            self.d = min(self.d_max, grown, self.d_limit)
            self.num = num
        else:
            self.nonfinite_steps += 1
        for p, x, g, state, dlr, group in moves:
            m = state["m"] if group["betas"][0] > 0 else self.d * g
            step = dlr * m / (np.sqrt(state["v"]) + self.d * group["eps"])
            decay = group["weight_decay"] * dlr if group["decouple"] else 0.0
            p.detach().copy_(torch.from_numpy(x - decay * x - step).view(p.shape))


def numpy(t: Tensor) -> np.ndarray:
    """A copy of ``t``, flat and in float64."""
    return t.detach().to("cpu", torch.float64).reshape(-1).clone().numpy()


# -- training runs, as data --------------------------------------------------------------------------------------------

STEPS = 160  # d moves in at least a dozen of them, and everything that a case has to show happens in half of them

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda k: 1.0,
    "warm-up from 0": lambda k: min(k / 20, 1.0),
    "0 in the middle": lambda k: 0.0 if 40 <= k < 50 else 1.0,
    "cosine": lambda k: 0.4 + 0.4 * math.cos(math.pi * k / STEPS),
}
ARRIVALS: dict[str, Callable[[int, int], bool]] = {  # of (step, parameter)
    "always": lambda k, i: True,
    "late": lambda k, i: k >= 15 * (i % 4),
    "now and then": lambda k, i: (k + i) % 5 > 0,
}
# Parameters are dealt to the groups in turn; "awake" tells when a group's lr is not 0.
GROUPS: dict[str, list[dict[str, Any]]] = {
    "one": [{}],
    "three": [{"eps": 1e-5}, {"weight_decay": 0.03, "slice_p": 3}, {"eps": 1e-3, "weight_decay": 0.0}],
    "one frozen": [{}, {"awake": lambda k: False, "weight_decay": 0.1}],
    "one asleep": [{"eps": 1e-5}, {}, {"awake": lambda k: not 20 <= k < 60, "weight_decay": 0.1}],
}


@dataclass(frozen=True)
class Case:
    """One training run."""

    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    arrival: str = "always"
    groups: str = "one"
    steps: int = STEPS
    seed: int = 0

    def deal(self, params: list[Tensor]) -> list[dict[str, Any]]:
        groups = GROUPS[self.groups]
        return [
            {**{key: v for key, v in group.items() if key != "awake"}, "params": params[i :: len(groups)]}
            for i, group in enumerate(groups)
        ]

    def lrs(self, k: int) -> list[float]:
        lr = SCHEDULES[self.schedule](k)
        return [lr if group.get("awake", lambda k: True)(k) else 0.0 for group in GROUPS[self.groups]]


class Net(nn.Module):
    """Convolution, attention and a gated MLP: 8 tensors, of which the biases and the gate start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.query_key, self.value = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.up, self.gate = nn.Linear(6, 12, bias=False), nn.Linear(6, 12, bias=False)
        self.out = nn.Linear(12, 10)
        for p in (self.conv.bias, self.gate.weight, self.out.bias):
            nn.init.zeros_(p)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).flatten(2).mT
        x = x + (self.query_key(x) @ x.mT).softmax(-1) @ self.value(x)
        x = x.mean(1)
        return self.out(torch.tanh(self.up(x)) * (1 + self.gate(x)))


def training(seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Net, Callable[[int], Tensor]]:
    """A model, and its loss at step k: eight of 64 noisy images, another eight each step."""
    torch.manual_seed(seed)
    model = Net().to(device, dtype)
    images = torch.randn(64, 2, 6, 6).to(device, dtype)
    labels = torch.randint(10, (64,)).to(device)
    batches = [torch.randperm(64)[:8].to(device) for _ in range(97)]

    def loss(k: int) -> Tensor:
        batch = batches[k % len(batches)]
        return nn.functional.cross_entropy(model(images[batch]), labels[batch])

    return model, loss


@dataclass
class Recording:
    """The oracle's run: where it started, the gradients, and every ``d`` and ``x`` after a step."""

    case: Case
    start: list[Tensor] = field(repr=False)
    grads: list[list[Tensor | None]] = field(repr=False)
    d: np.ndarray = field(repr=False)  # (steps,)
    x: np.ndarray = field(repr=False)  # (steps, numel of all parameters)


def record(case: Case) -> Recording:
    """Trains :class:`Net` with prodigyopt in float64."""
    model, loss = training(case.seed)
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    opt = Prodigyopt(case.deal(params), **case.options)
    recorded: list[list[Tensor | None]] = []

    def gradients(k: int) -> list[Tensor | None]:
        grads = torch.autograd.grad(loss(k), params)
        recorded.append([g if ARRIVALS[case.arrival](k, i) else None for i, g in enumerate(grads)])
        return recorded[-1]

    d, x = drive(opt, case, params, gradients)
    return Recording(case, start, recorded, d, x)


def replay(make: Callable[..., Any], run: Recording, dtype: torch.dtype, device: str = "cpu"):
    """Feeds recorded gradients to the optimizer ``make(groups, **options)``.

    Returns:
        Its ``d`` and ``x`` as in :class:`Recording`, and the optimizer.
    """
    params = [nn.Parameter(p.to(device, dtype, copy=True)) for p in run.start]
    opt = make(run.case.deal(params), **run.case.options)

    def gradients(k: int) -> list[Tensor | None]:
        return [None if g is None else g.to(device, dtype) for g in run.grads[k]]

    return *drive(opt, run.case, params, gradients), opt


def drive(opt: Any, case: Case, params: list[Tensor], gradients: Callable[[int], list[Tensor | None]]):
    """Steps ``opt`` through ``case``; returns the ``d`` and ``x`` after each step."""
    ds, xs = [], []
    for k in range(case.steps):
        for group, lr in zip(opt.param_groups, case.lrs(k), strict=True):
            group["lr"] = lr
        for p, g in zip(params, gradients(k), strict=True):
            p.grad = g
        opt.step()
        ds.append(opt.d)
        xs.append(np.concatenate([numpy(p) for p in params]))
    return np.array(ds), np.array(xs)


# -- comparisons -------------------------------------------------------------------------------------------------------


def worst(ours: np.ndarray, theirs: np.ndarray, least: float = 0.0) -> float:
    """The largest difference of two tensors, relative to the largest element of the second, or to ``least``."""
    if ours.size == 0:
        return 0.0
    difference = np.abs(ours - theirs).max()
    return float(difference / max(np.abs(theirs).max(), least)) if difference > 0 else 0.0


Layout = Callable[[Tensor], Tensor]


class Pair:
    """The same parameters under an optimizer and under an oracle, given the same gradients.

    ``groups`` hold float64 CPU tensors; ``layouts`` may arrange each parameter, and its gradient, in memory.
    """

    def __init__(
        self,
        make: Any,
        oracle: Any,
        groups: list[dict[str, Any]],
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        layouts: list[tuple[Layout, Layout]] | None = None,
        **options: Any,
    ) -> None:
        self.dtype, self.device, self.layouts = dtype, device, layouts
        self.theirs = [p.to(dtype).to(torch.float64, copy=True) for group in groups for p in group["params"]]
        self.ours = [nn.Parameter(self.placed(p, i, 0)) for i, p in enumerate(self.theirs)]
        self.start = [p.detach().clone() for p in self.ours]
        self.opt, self.oracle = (
            cls(self._regroup(groups, params), **options) for cls, params in ((make, self.ours), (oracle, self.theirs))
        )
        self.k = 0
        self.reach = [0.0] * len(self.theirs)  # the largest element that each has had: a step may lead back to 0

    @staticmethod
    def _regroup(groups: list[dict[str, Any]], params: list[Tensor]) -> list[dict[str, Any]]:
        rest = iter(params)
        return [{**group, "params": [next(rest) for _ in group["params"]]} for group in groups]

    def placed(self, t: Tensor, i: int, which: int) -> Tensor:
        t = t.to(self.device, self.dtype, copy=True)
        return t if self.layouts is None else self.layouts[i][which](t)

    def step(self, grads: list[Tensor | None], *lrs: float) -> None:
        """One step of both; ``lrs``: the groups', if they change."""
        for optimizer in (self.opt, self.oracle):
            for group, lr in zip(optimizer.param_groups, lrs, strict=False):
                group["lr"] = lr
        for i, (ours, theirs, g) in enumerate(zip(self.ours, self.theirs, grads, strict=True)):
            ours.grad = None if g is None else self.placed(g, i, 1)
            theirs.grad = None if g is None else g.to(self.dtype).double()
        self.opt.step()
        self.oracle.step()
        self.k += 1
        sizes = [float(p.detach().abs().max()) if p.numel() else 0.0 for p in self.theirs]
        self.reach = list(map(max, self.reach, sizes))

    def check(self, tolerance: float) -> None:
        """That d, and every parameter relative to the largest element it has had, agree."""
        errors = {"d": abs(self.opt.d / self.oracle.d - 1)}
        for i, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            errors[f"parameter {i} {tuple(ours.shape)}"] = worst(numpy(ours), numpy(theirs), self.reach[i])
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        assert (wrong, self.k) == ({}, self.k)

    def unmoved(self, *indices: int) -> bool:
        """Whether these parameters (all, if none is given) are bitwise what they were at the start."""
        return all(torch.equal(self.ours[i], self.start[i]) for i in indices or range(len(self.ours)))


def snapshot(opt: Any) -> list[Any]:
    """A copy of all that a step can change: the parameters, their states and the groups' numbers."""
    params = [p for group in opt.param_groups for p in group["params"]]
    tensors = [p.detach().clone() for p in params]
    states = [{key: t.clone() for key, t in opt.state.get(p, {}).items() if key != "step"} for p in params]
    numbers = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in opt.param_groups]
    numbers = [{k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()} for group in numbers]
    return [tensors, states, numbers]


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of two snapshots."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, dict)):
        items = zip(a, b, strict=False) if isinstance(a, list) else ((v, b.get(k)) for k, v in a.items())
        return len(a) == len(b) and all(same(x, y) for x, y in items)
    return bool(a == b)
