"""Two learning rates under one estimate: each group's lr is a factor of the common step size d.

    python examples/two_learning_rates.py

An encoder learns at half the step size of the head, as text encoders often do next to an image model. d is estimated
from both groups, and a scheduler scales both, so the ratio stays. `prodigyopt` refuses different learning rates.
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from prodigy_fused import Prodigy

STEPS = 300


def main():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = torch.sin(x.sum(dim=1, keepdim=True))
    encoder = nn.Sequential(nn.Linear(8, 64), nn.Tanh())
    head = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    groups = [
        {"params": head.parameters()},  # lr=1, the default
        {"params": encoder.parameters(), "lr": 0.5},
    ]
    opt = Prodigy(groups)
    schedule = CosineAnnealingLR(opt, STEPS)
    for step in range(STEPS):
        opt.zero_grad()
        loss = nn.functional.mse_loss(head(encoder(x)), y)
        loss.backward()
        opt.step()
        if step % 50 == 49:
            d = opt.d  # read once, and not in every step: on a GPU this waits
            rates = ", ".join(f"{d * group['lr']:.2e}" for group in opt.param_groups)
            print(f"step {step:3}: d {d:.2e}, d * lr of the groups {rates}, loss {loss.item():.4f}")
        schedule.step()

    if not loss < 0.1 * y.var():
        raise SystemExit(f"did not learn: the loss is {loss.item():.4f}, the variance of the targets {y.var():.4f}")


if __name__ == "__main__":
    main()
