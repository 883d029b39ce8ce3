"""Mixed precision: float16 autocast with a GradScaler, and gradients clipped to a norm.

    python examples/grad_scaler.py

The gradients are unscaled before they are clipped, or the threshold would apply to the scaled ones. A step whose
gradients are not finite is skipped: the parameters, the state and the estimate d stay as they were.
"""

import torch
from torch import nn

from prodigy_fused import Prodigy


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(512, 8, device=device)
    y = torch.sin(2 * x).sum(dim=1, keepdim=True)
    model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 1)).to(device)

    opt = Prodigy(model.parameters())
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20)  # too high for float16: the first steps are skipped
    for step in range(401):
        opt.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            prediction = model(x)
        loss = nn.functional.mse_loss(prediction.float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        scaler.step(opt)
        scaler.update()
        if step % 50 == 0:
            scale = scaler.get_scale()
            print(f"step {step:3}: loss {loss.item():.4f}, d {opt.d:.2e}, scale {scale:g}, norm {norm:.2f}")

    print(f"{step + 1 - opt.step_count} steps were skipped")
    if not loss < 0.1 * y.var():
        raise SystemExit(f"did not learn: the loss is {loss.item():.4f}, the variance of the targets {y.var():.4f}")


if __name__ == "__main__":
    main()
