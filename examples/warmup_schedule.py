"""Schedulers: a warm-up from a learning rate of 0, then a cosine decay. The schedule scales the estimated step size.

    python examples/warmup_schedule.py

`safeguard_warmup=True` keeps the learning rate out of the denominator of the estimate. Without it, d reaches its final
value before the warm-up ends, and the loss of this program first rises to twice its start. While the learning rate is
0, the parameters and the estimate are left alone.
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, SequentialLR

from prodigy_fused import Prodigy

STEPS, WARM_UP = 400, 40


def main():
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = torch.sin(2 * x).sum(dim=1, keepdim=True)
    model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 1))

    opt = Prodigy(model.parameters(), safeguard_warmup=True)
    # LambdaLR, because LinearLR refuses to start from 0.
    warm_up = LambdaLR(opt, lambda step: step / WARM_UP)
    decay = CosineAnnealingLR(opt, STEPS - WARM_UP)
    schedule = SequentialLR(opt, [warm_up, decay], milestones=[WARM_UP])
    for step in range(STEPS):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        lr = schedule.get_last_lr()[0]
        opt.step()
        schedule.step()
        if step in (0, WARM_UP // 2, WARM_UP) or step % 100 == 99:
            print(f"step {step:3}: lr {lr:.3f}, d {opt.d:.2e}, d * lr {opt.d * lr:.2e}, loss {loss.item():.4f}")

    if not loss < 0.1 * y.var():
        raise SystemExit(f"did not learn: the loss is {loss.item():.4f}, the variance of the targets {y.var():.4f}")


if __name__ == "__main__":
    main()
