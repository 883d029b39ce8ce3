"""A plain training loop. Prodigy estimates its own step size, so there is no learning rate to choose.

    python examples/plain_loop.py

`d` starts at 1e-6, grows within the first steps to the step size that the problem allows, and then stays.
"""

import torch
from torch import nn

from prodigy_fused import Prodigy


def main():
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = torch.sin(2 * x).sum(dim=1, keepdim=True)
    model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 1))

    # lr stays at its default of 1. fused=True would raise, with the reason, where no compiled backend can be used.
    opt = Prodigy(model.parameters(), weight_decay=0.01)
    for step in range(301):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        if step % 50 == 0:
            print(f"step {step:3}: loss {loss.item():.4f}, d {opt.d:.2e}")

    if not loss < 0.1 * y.var():
        raise SystemExit(f"did not learn: the loss is {loss.item():.4f}, the variance of the targets {y.var():.4f}")


if __name__ == "__main__":
    main()
