"""LoRA-like fine-tuning in pure bfloat16: frozen weights, and a pair of small trained matrices per layer.

    python examples/lora_bfloat16.py

bfloat16 has 8 significant bits, and Prodigy's first steps are about 1e-6: rounded to nearest, most of them are lost.
`low_precision` keeps them: "stochastic" rounds so that the result is exact on average, "displacement" keeps the
distance from the start in float32, 4 bytes more for each parameter.
"""

import torch
from torch import nn

from prodigy_fused import Prodigy


class LoRALinear(nn.Module):
    """A frozen linear layer plus the product of two trained matrices, of which the second starts at zero."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def fine_tune(mode):
    """Returns the loss before and after, and d."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64)
    change = torch.randn(64, 2) @ torch.randn(2, 64) / 64  # of rank 2: what the new task asks for
    model = LoRALinear(base).to(torch.bfloat16)
    opt = Prodigy([p for p in model.parameters() if p.requires_grad], low_precision=mode)
    losses = []
    for _ in range(400):
        x = torch.randn(128, 64)
        target = x @ (base.weight.float() + change).T + base.bias.float()
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x.bfloat16()).float(), target)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses[0], losses[-1], opt.d


def main():
    for mode in ("stochastic", "displacement"):
        first, last, d = fine_tune(mode)
        print(f"{mode:12}: loss {first:.2e} before, {last:.2e} after fine-tuning, d {d:.2e}")
        if not last < 0.1 * first:
            raise SystemExit(f"did not learn with low_precision={mode!r}")


if __name__ == "__main__":
    main()
