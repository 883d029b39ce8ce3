"""What a sample of every p-th element makes of d: the estimate at each of the p places where the sample could begin, to
that of all elements, on the path of one run of the demo's GPT."""

from __future__ import annotations

import argparse
import json
from math import gcd, sqrt
from pathlib import Path
from typing import Any

import rows
import torch
from shared import GPT, RESULTS, Corpus, load_text
from torch import Tensor, nn

from prodigy_fused import Prodigy

FILE = RESULTS / "slice_p.json"
# Widths of the model: a power of 2, and 3 * 4 * 11.
WIDTHS = (128, 132)
SLICES = (2, 3, 5, 8, 11, 13, 16, 31, 33, 61, 64)


class Starts:
    """Follows a run with ``slice_p=1``, and what the estimate would be from every p-th element alone.

    Args:
        optimizer: of one estimate, with default ``beta3``, ``d_coef`` and ``safeguard_warmup``.
        slices: the p.
    """

    def __init__(self, optimizer: Prodigy, slices: tuple[int, ...] = SLICES) -> None:
        self.optimizer = optimizer
        self.params: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.starts = [p.detach().clone() for p in self.params]
        index = torch.cat([torch.arange(p.numel()) for p in self.params])
        self.places = {p: index % p for p in slices}
        self.numerator, self.s = torch.zeros(len(index)), torch.zeros(len(index))
        self.whole, self.largest = 0.0, {p: torch.zeros(p, dtype=torch.float64) for p in slices}

    def step(self) -> None:
        """Takes the optimizer's step, and notes the largest estimate so far of each sample."""
        group = self.optimizer.param_groups[0]
        rate = group["d"] * group["lr"] * group["d"] / group["d0"]
        g = torch.cat([p.grad.flatten() for p in self.params])  # type: ignore[union-attr]
        moved = torch.cat([(x0 - p.detach()).flatten() for x0, p in zip(self.starts, self.params, strict=True)])
        beta3 = sqrt(group["betas"][1])
        self.numerator.mul_(beta3).add_(g * moved, alpha=rate)
        self.s.mul_(beta3).add_(g, alpha=rate)
        self.optimizer.step()
        self.whole = max(self.whole, (self.numerator.double().sum() / self.s.abs().double().sum()).item())
        for p, place in self.places.items():
            sums = [torch.bincount(place, t.double(), p) for t in (self.numerator, self.s.abs())]
            self.largest[p] = self.largest[p].maximum(sums[0] / sums[1])

    def ratios(self) -> dict[int, Tensor]:
        """Returns the largest estimate of each sample, to that of all elements: for each p as many as p."""
        return {p: found / self.whole for p, found in self.largest.items()}


def shared_factor(params: list[nn.Parameter], p: int) -> int:
    """Returns the factor that p has in common with the last dimension of the largest matrix."""
    return gcd(p, max(params, key=Tensor.numel).shape[-1])


def train(width: int, corpus: Corpus, steps: int, batch: int, seed: int) -> Starts:
    """Trains a model as the demo does."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = GPT(len(corpus.vocabulary), layers=2, embd=width)
    optimizer = Prodigy(model.param_groups(0.1))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    starts = Starts(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(*corpus.get_batch("train", batch, model.block, draw)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        starts.step()
        schedule.step()
    return starts


def figures(found: list[Tensor]) -> dict[str, Any]:
    """Returns the spread of the ratios of some runs: the standard deviation around 1, the smallest and the largest."""
    ratios = torch.cat(found)
    values = {"deviation": (ratios - 1).square().mean().sqrt(), "least": ratios.min(), "most": ratios.max()}
    return {name: round(value.item(), 3) for name, value in values.items()}


def table() -> str:
    """Returns the committed figures as Markdown: a line for each p."""
    results = json.loads(FILE.read_text())
    head = [cell for width in WIDTHS for cell in (f"width {width}: factor", "deviation of d", "least - most")]
    lines = [f"| `slice_p` | {' | '.join(head)} |", "| ---: |" + " ---: |" * len(head)]
    for p in SLICES:
        found = [results["figures"][f"width {width}, slice_p={p}"] for width in WIDTHS]
        cells = [(f["factor"], f"{f['deviation']:.0%}", f"{f['least']:.2f} - {f['most']:.2f}") for f in found]
        lines.append(f"| {p} | {' | '.join(str(cell) for row in cells for cell in row)} |")
    where = f"{results['device']}, torch {results['torch']}, commit {results['commit']}, {results['date']}"
    return "\n".join([*lines, "", f"{results['steps']} steps, {results['seeds']} seeds; {where}."])


def main() -> None:
    """Trains all models and writes the figures."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=12, help="sequences of 64 characters per step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = {**rows.environment(torch.device("cpu"), "full"), "steps": args.steps, "batch": args.batch}
    setting["seeds"] = args.seeds
    corpus = Corpus(load_text())
    results: dict[str, Any] = {}
    for width in WIDTHS:
        runs = [train(width, corpus, args.steps, args.batch, seed) for seed in range(args.seeds)]
        for p in SLICES:
            row = figures([run.ratios()[p] for run in runs])
            results[f"width {width}, slice_p={p}"] = {"factor": shared_factor(runs[0].params, p), **row}
            print(width, p, results[f"width {width}, slice_p={p}"], flush=True)
    args.out.write_text(json.dumps({**setting, "figures": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
