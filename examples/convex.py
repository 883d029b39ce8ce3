"""The paper's methods for convex problems, on least absolute deviations from a far-away start.

    python examples/convex.py

Each method has the theorem about `opt.average()`, and `opt.d` is what it thinks the distance to the solution is. No
method but Adagrad-norm is told that distance, and all start with an estimate that is a million times too small.
"""

import torch
from torch import nn

from prodigy_fused import convex


def main():
    torch.manual_seed(0)
    data = torch.randn(200, 10, dtype=torch.float64)
    solution = torch.randn(10, dtype=torch.float64)
    distance = solution.norm().item()

    def f(x):
        return (data @ (x - solution)).abs().mean()

    first = f(torch.zeros_like(solution)).item()
    print(f"the distance is {distance:.2f}, the loss at the start {first:.2f}; after 400 steps")
    losses = {}
    for name in ("ProdigyGD", "ProdigyDA", "DAdaptGD", "DAdaptDA", "DoG", "DoWG", "AdagradNorm"):
        x = nn.Parameter(torch.zeros_like(solution))
        told = {"D": distance} if name == "AdagradNorm" else {"d0": 1e-6 * distance}
        opt = getattr(convex, name)([x], **told)
        for _ in range(400):
            opt.zero_grad()
            f(x).backward()
            opt.step()
        losses[name] = f(opt.average()[0]).item()
        print(f"{name:11}: the loss of the average {losses[name]:.4f}, d {opt.d:.2e}")

    if not losses["ProdigyGD"] < min(0.2 * first, losses["DAdaptGD"]):
        raise SystemExit(f"did not learn: the losses are {losses}")


if __name__ == "__main__":
    main()
