"""The methods of prodigy_fused.convex once more: brute force over the whole history, in long double; and problems with
known solutions.

Each formula is written out from docs/convex.md, and sums all its terms anew at every step. The product runs by
itself, and its gradients are given to the oracle: a difference in the last bit then does not grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from toolbox import parameters
from torch import Tensor, nn

from prodigy_fused import convex

LD = np.longdouble
SHAPES = ((2, 3), (2,), ())  # nine numbers


class Oracle:
    """Everything that happened; ``step`` appends x_{k+1}, d_{k+1}, d_hat_{k+1} and the weight of x_k."""

    def __init__(self, method: str, x0: np.ndarray, d0: float = 1e-6, G: float = 0.0, **options: Any) -> None:
        self.rule = RULES[method]
        self.x, self.d, self.d_hat, self.g, self.f = [x0.astype(LD)], [LD(d0)], [LD(0)], [], []
        self.weights: list[Any] = []
        self.G, self.options, self.first = LD(G), options, 0  # `first` index since the last reset

    def step(self, g: np.ndarray, loss: float = 0.0) -> None:
        self.g.append(g.astype(LD))
        self.f.append(LD(loss))
        x, d_hat, weight, *d = self.rule(self, len(self.g) - 1)
        self.x.append(x)
        self.d_hat.append(d_hat)
        self.d.append(d[0] if d else max(self.d[-1], d_hat))
        self.weights.append(weight)

    @property
    def average(self) -> np.ndarray:
        return sum(w * x for w, x in zip(self.weights, self.x, strict=False)) / sum(self.weights)

    def sum(self, term: Callable[[int], Any]) -> Any:
        return sum((term(i) for i in range(self.first, len(self.g))), LD(0))

    def gg(self, i: int) -> Any:
        return self.g[i] @ self.g[i]

    def inner(self, i: int) -> Any:
        return self.g[i] @ (self.x[0] - self.x[i])


def norm(x: np.ndarray) -> Any:
    return np.sqrt(x @ x)


def descend(h: Oracle, k: int, eta: Callable[[int], Any]) -> Any:
    """x_{k+1} = x0 - sum eta_i g_i, and the estimate of the forms of gradient descent."""
    etas = [eta(i) for i in range(k + 1)]
    x = h.x[0] - h.sum(lambda i: etas[i] * h.g[i])
    return x, h.sum(lambda i: etas[i] * h.inner(i)) / norm(x - h.x[0]), etas[k]


def prodigy_gd(h: Oracle, k: int) -> Any:
    lam = [LD(h.options.get("weights", lambda i: 1)(i)) for i in range(k + 1)]
    squares = np.cumsum([h.d[i] ** 2 * lam[i] ** 2 * h.gg(i) for i in range(k + 1)])
    return descend(h, k, lambda i: h.d[i] ** 2 * lam[i] / np.sqrt(h.d[i] ** 2 * h.G**2 + squares[i]))


def dadapt_gd(h: Oracle, k: int) -> Any:
    squares = np.cumsum([h.gg(i) for i in range(k + 1)])
    return descend(h, k, lambda i: h.d[i] / np.sqrt(h.G**2 + squares[i]))


def prodigy_da(h: Oracle, k: int) -> Any:
    s = h.sum(lambda i: h.d[i] ** 2 * h.g[i])
    d_hat = h.sum(lambda i: h.d[i] ** 2 * h.inner(i)) / norm(s)
    d = max(h.d[k], d_hat)
    root = np.sqrt(d**2 * h.G**2 + h.sum(lambda i: h.d[i] ** 2 * h.gg(i)))
    return h.x[0] - s / root, d_hat, h.d[k] ** 2


def prodigy_coordinate(h: Oracle, k: int) -> Any:
    s = h.sum(lambda i: h.d[i] ** 2 * h.g[i])
    d_hat = h.sum(lambda i: h.d[i] ** 2 * h.inner(i)) / np.abs(s).sum()
    d = max(h.d[k], d_hat)
    root = np.sqrt(d**2 * h.G**2 + h.sum(lambda i: h.d[i] ** 2 * h.g[i] ** 2))
    return h.x[0] - s / np.where(root == 0, 1, root), d_hat, h.d[k] ** 2


def dadapt_da(h: Oracle, k: int) -> Any:
    s = h.sum(lambda i: h.d[i] * h.g[i])
    d_hat = h.sum(lambda i: h.d[i] * h.inner(i)) / norm(s)
    return h.x[0] - s / np.sqrt(h.G**2 + h.sum(h.gg)), d_hat, h.d[k]


def dadapt_reset(h: Oracle, k: int) -> Any:
    x, d_hat, _ = dadapt_da(h, k)  # since the last reset d is the same
    if d_hat <= h.options.get("threshold", 2) * h.d[k]:
        return x, d_hat, LD(1), h.d[k]
    h.first = k + 1
    return h.x[0], d_hat, LD(1), d_hat


def dog(h: Oracle, k: int) -> Any:
    eta = max([h.d[0], *(norm(x - h.x[0]) for x in h.x)]) / np.sqrt(h.sum(h.gg))
    x = h.x[k] - eta * h.g[k]
    return x, norm(x - h.x[0]), h.d[k]


def dowg(h: Oracle, k: int) -> Any:
    x = h.x[k] - h.d[k] ** 2 / np.sqrt(h.sum(lambda i: h.d[i] ** 2 * h.gg(i))) * h.g[k]
    return x, norm(x - h.x[0]), h.d[k] ** 2


def told(h: Oracle, k: int, eta: Any, weight: Any) -> Any:
    return h.x[k] - eta * h.g[k], LD(0), weight


def adagrad_norm(h: Oracle, k: int) -> Any:
    eta = h.d[0] / np.sqrt(h.sum(h.gg))
    return told(h, k, eta, eta)


def normalized(h: Oracle, k: int) -> Any:
    eta = h.d[0] / np.sqrt(LD(k + 1)) / norm(h.g[k])
    return told(h, k, eta, eta)


def polyak(h: Oracle, k: int) -> Any:
    return told(h, k, max(LD(0), h.f[k] - LD(h.options["f_star"])) / h.gg(k), LD(1))


RULES = {
    "ProdigyGD": prodigy_gd, "ProdigyDA": prodigy_da, "DAdaptReset": dadapt_reset,
    "ProdigyCoordinate": prodigy_coordinate, "DAdaptGD": dadapt_gd, "DAdaptDA": dadapt_da, "DoG": dog, "LDoG": dog,
    "DoWG": dowg, "AdagradNorm": adagrad_norm, "NormalizedSubgradient": normalized, "Polyak": polyak,
}  # fmt: skip
METHODS = tuple(RULES)
ESTIMATING = ("ProdigyGD", "ProdigyDA", "DAdaptReset", "ProdigyCoordinate", "DAdaptGD", "DAdaptDA")
DISTANCE = ("DoG", "DoWG", "LDoG")
TOLD = ("AdagradNorm", "NormalizedSubgradient")
ALL = (*METHODS, "DAdaptAdam")


def options_of(method: str, d0: float, G: float = 0.0, D: float = 1.0, f_star: float = 0.0) -> dict[str, Any]:
    """Returns the arguments among these that a method has."""
    if method in ESTIMATING:
        return {"d0": d0, "G": G}
    if method == "Polyak":
        return {"f_star": f_star}
    return {"d0": d0} if method in DISTANCE else {"D": D}


# -- problems ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A convex f of one vector, a subgradient g of it, and a minimiser."""

    name: str
    f: Callable[[Tensor], Tensor]
    g: Callable[[Tensor], Tensor]
    x0: Tensor
    solution: Tensor
    G: float = 1.0  # bounds the norm of every subgradient
    G_inf: float = 1.0  # bounds every coordinate

    @cached_property
    def least(self) -> float:
        return float(self.f(self.solution))

    @property
    def D(self) -> float:
        return float((self.x0 - self.solution).norm())

    @property
    def D_inf(self) -> float:
        return float((self.x0 - self.solution).abs().max())


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problems() -> list[Problem]:
    """Seven, whose minimum is known because the data were made from the solution."""
    A, x, x0, one = normal(1, 40, 9), 3 * normal(2, 9), normal(3, 9), torch.ones(1, dtype=torch.float64)
    rows, largest, scale = A.norm(dim=1), A.abs().mean(dim=0).max().item(), torch.arange(1.0, 10.0).double()
    faces, corners = torch.cat([A, -A]), torch.cat([scale.diag(), -scale.diag()])
    labels = (A @ x).sign()
    planted = x / (labels * (A @ x)).min()
    signed = labels[:, None] * A

    def face(of: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: of[(of @ (y - x)).argmax()]

    return [
        Problem("abs", lambda y: (y - 4).abs().sum(), lambda y: (y - 4).sign(), 0 * one, 4 * one),
        Problem("norm", lambda y: (y - x).norm(), lambda y: nn.functional.normalize(y - x, dim=0), x0, x),
        Problem(
            "lad", lambda y: (A @ (y - x)).abs().mean(), lambda y: A.T @ (A @ (y - x)).sign() / 40, x0, x,
            float(rows.mean()), largest,
        ),
        Problem(
            "l1", lambda y: (scale * (y - x)).abs().sum(), lambda y: scale * (y - x).sign(), x0, x,
            float(scale.norm()), 9.0,
        ),
        Problem("linf", lambda y: (scale * (y - x)).abs().max(), face(corners), x0, x, 9.0, 9.0),
        Problem(
            "polyhedral", lambda y: (faces @ (y - x)).max(), face(faces), x0, x,
            float(rows.max()), float(A.abs().max()),
        ),
        Problem(
            "hinge", lambda y: (1 - signed @ y).clamp(min=0).mean(),
            lambda y: -signed.T @ (signed @ y < 1).double() / 40, x0, planted, float(rows.mean()), largest,
        ),
    ]  # fmt: skip


def split(x: Tensor) -> list[nn.Parameter]:
    """Returns nine numbers as parameters of ``SHAPES``, in row-major order."""
    parts = x.split([int(np.prod(shape)) for shape in SHAPES])
    return [nn.Parameter(part.reshape(shape).clone()) for part, shape in zip(parts, SHAPES, strict=True)]


def joined(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def make(method: str, params: Any, **options: Any) -> Any:
    return getattr(convex, method)(params, **options)


def advance(opt: Any, params: list[nn.Parameter], f: Callable[[Tensor], Tensor]) -> float:
    """Takes a step on f, and returns f at the point before it."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = f(joined(params))
        loss.backward()
        return loss

    return opt.step(closure).item()


# -- optimizers on random gradients ------------------------------------------------------------------------------------


def other(method: str) -> dict[str, float]:
    """Returns an argument that is not what ``start`` gives."""
    return {"f_star": -1.0} if method == "Polyak" else {"D": 3.0} if method in TOLD else {"d0": 3.0}


def start(method: str, params: Any = None, **options: Any) -> Any:
    """A method on three tensors, or those given; from 1e-2 where it takes a first estimate."""
    params = split(normal(3, 9)) if params is None else params
    given = {"d0": 1e-2} if method == "DAdaptAdam" else options_of(method, 1e-2)
    return make(method, params, **{**given, **options})


def feed(opt: Any, k: int, without: tuple[int, ...] = ()) -> None:
    """Gives every parameter its gradient of step k, those ``without`` None."""
    for i, p in enumerate(parameters(opt)):
        p.grad = None if i in without else (normal(i, *p.shape) + 0.3 * normal(9 * k + i, *p.shape)).to(p.dtype)


def step(opt: Any, k: int, without: tuple[int, ...] = ()) -> None:
    feed(opt, k, without)
    opt.step(lambda: 1.0 + k)


def everything(opt: Any) -> Tensor:
    """All that a user sees of an optimizer, as one vector."""
    averages = opt.average() if hasattr(opt, "average") else []
    return joined([*parameters(opt), *averages, torch.tensor([opt.d, opt.d_hat, opt.step_count])]).detach()


def same(a: Any, b: Any) -> bool:
    return torch.equal(everything(a), everything(b))
