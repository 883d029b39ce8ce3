"""The decay of the estimate's sums in Algorithm 4: beta3 = sqrt(beta2), or beta2?

With sqrt(beta2) the estimate is that of the weighted sums with lambda_k = beta2^(-k/2), the weights that v has: "sums"
runs Prodigy on a regression in float64, and compares `d_hat` with the sums over the whole history. "mnist" trains a
network with one hidden layer on 4,000 pictures, and tests it on 1,000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from paper import data
from paper.experiments import Row
from paper.report import Verdict
from prodigy_fused import Prodigy

PART = "convex"  # no network of the paper's: a question about the method
PACKAGES = ("mlxtend",)
KEYS = ("problem", "beta2", "beta3", "seed")
NUMBERS = ("error", "accuracy", "loss", "d")
BETA2 = (0.9, 0.99, 0.999)
ROOT, SAME = "sqrt(beta2)", "beta2"
SEEDS = 5
STEPS, BATCH, HIDDEN, TESTED = 600, 100, 64, 1000


def runs(full: bool) -> Iterator[Row]:
    """Yields both problems with both choices; `full` is no more."""
    for beta2 in BETA2:
        for beta3 in (ROOT, SAME):
            for seed in range(SEEDS):
                for problem in ("sums", "mnist"):
                    yield {"problem": problem, "beta2": beta2, "beta3": beta3, "seed": seed}


def run(key: Row) -> Row:
    """Compares the sums, or trains the network."""
    options = {"betas": (0.9, key["beta2"]), "beta3": key["beta2"] if key["beta3"] == SAME else None, "fused": True}
    found = _sums(key["seed"], options) if key["problem"] == "sums" else _mnist(key["seed"], options)
    return {**dict.fromkeys(NUMBERS, ""), **found}


def _sums(seed: int, options: Row) -> Row:
    """Returns the largest relative difference of `d_hat` from that of the sums with weights beta2^(-k/2)."""
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((100, 10), (100,)))
    x = nn.Parameter(torch.randn(10, generator=draw, dtype=torch.float64))
    opt, x0, ratio = Prodigy([x], **options), x.detach().clone(), options["betas"][1] ** -0.5
    num, s, error = 0.0, torch.zeros_like(x0), 0.0
    for k in range(200):
        opt.zero_grad()
        F.mse_loss(a @ x, b).backward()
        weight = ratio**k * opt.d**2
        num += weight * torch.dot(x.grad, x0 - x.detach()).item()
        s += weight * x.grad
        opt.step()
        wanted = num / s.abs().sum().item()
        if wanted > 0:
            error = max(error, abs(opt.param_groups[0]["d_hat"] / wanted - 1))
    return {"error": error, "d": opt.d}


def _mnist(seed: int, options: Row) -> Row:
    """Returns the test's accuracy and loss, and d."""
    pictures, digits = data.mnist_5k()
    train, test = (pictures[TESTED:], digits[TESTED:]), (pictures[:TESTED], digits[:TESTED])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    opt = Prodigy(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(train[0]), (BATCH,))
        opt.zero_grad()
        F.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
        opt.step()
        schedule.step()
    with torch.no_grad():
        logits = model(test[0])
    right = (logits.argmax(1) == test[1]).double().mean().item()
    return {"accuracy": right, "loss": F.cross_entropy(logits, test[1]).item(), "d": opt.d}


def _values(rows: list[Row], problem: str, beta2: float, beta3: str, number: str) -> list[float]:
    """Returns a number of all seeds, in their order."""
    same = [row for row in rows if (row["problem"], row["beta2"], row["beta3"]) == (problem, beta2, beta3)]
    return [row[number] for row in sorted(same, key=lambda row: row["seed"])]


def plot(rows: list[Row]) -> dict[str, plt.Figure]:
    """Plots the test's accuracy and d of every run."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axes, number in zip(panels, ("accuracy", "d"), strict=True):
        for shift, beta3, colour in ((-0.12, ROOT, "#d55e00"), (0.12, SAME, "#0072b2")):
            for place, beta2 in enumerate(BETA2):
                values = _values(rows, "mnist", beta2, beta3, number)
                label = f"beta3 = {beta3}" if place == 0 else None
                axes.plot([place + shift] * len(values), values, "o", color=colour, alpha=0.6, label=label)
        axes.set_xticks(range(len(BETA2)), [f"beta2 = {beta2:g}" for beta2 in BETA2])
        axes.set(title={"accuracy": "MNIST-5k: accuracy on the test's pictures", "d": "d"}[number])
        axes.grid(alpha=0.25)
    panels[0].legend()
    return {"": figure}


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Returns means and standard deviations over the seeds."""
    lines = []
    for beta2 in BETA2:
        for beta3 in (ROOT, SAME):
            cells = []
            for number, factor, form in (("accuracy", 100, ".2f"), ("loss", 1, ".3f"), ("d", 1, ".4f")):
                values = [factor * value for value in _values(rows, "mnist", beta2, beta3, number)]
                cells.append(f"{fmean(values):{form}} ± {stdev(values):{form}}")
            error = max(_values(rows, "sums", beta2, beta3, "error"))
            lines.append([f"{beta2:g}", beta3, *cells, f"{error:.1e}"])
    header = ["beta2", "beta3", "accuracy, %", "test loss", "d", "d_hat's error to the weighted sums"]
    return {"MNIST-5k, mean and standard deviation over the seeds": [header, *lines]}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Returns whether the identity holds, and whether it matters."""
    errors = {beta3: [max(_values(rows, "sums", beta2, beta3, "error")) for beta2 in BETA2] for beta3 in (ROOT, SAME)}
    off = f"off by at most {max(errors[ROOT]):.0e} with {ROOT}, by at least {min(errors[SAME]):.0e} with {SAME}"
    identity = max(errors[ROOT]) < 1e-9 < min(errors[SAME])
    gains = {}
    for beta2 in BETA2:
        root, same = (_values(rows, "mnist", beta2, beta3, "accuracy") for beta3 in (ROOT, SAME))
        pairs = [100 * (a - b) for a, b in zip(root, same, strict=True)]
        gains[beta2] = (fmean(pairs), stdev(pairs) / math.sqrt(len(pairs)))
    seen = ", ".join(f"{gain:+.2f} ± {error:.2f} (beta2 = {beta2:g})" for beta2, (gain, error) in gains.items())
    beyond = [abs(gain) > 3 * error for gain, error in gains.values()]
    return [
        Verdict(f"the sums are those with lambda_k = beta2^(-k/2) if beta3 = {ROOT}", off, identity),
        Verdict(
            "it makes a difference in training", f"points of accuracy with {ROOT}, same seeds: {seen}", any(beyond)
        ),
    ]
