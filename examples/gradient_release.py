"""Gradient release: each parameter is stepped, and its gradient freed, while backward goes on.

    python examples/gradient_release.py

The numbers are those of the ordinary step, bit for bit; what is measured is how many bytes of gradients are alive at
the same time.
"""

import torch
from torch import nn

import prodigy_fused
from prodigy_fused import Prodigy

WIDTH, LAYERS, STEPS = 128, 8, 60


class Watched:
    """Knows how many bytes of gradients were alive at most."""

    def __init__(self, model):
        self.params, self.most = list(model.parameters()), 0
        for p in self.params:
            p.register_hook(self.look)

    def look(self, grad):  # the one that has just been computed, and those that are kept
        kept = sum(p.grad.nbytes for p in self.params if p.grad is not None)
        self.most = max(self.most, kept + grad.nbytes)


def train(release):
    """Returns the losses, and the bytes of gradients at the peak."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    x = torch.randn(64, WIDTH)
    y = x[:, :8].sum(1, keepdim=True)
    opt = Prodigy(model.parameters())
    watched = Watched(model)
    if release:
        prodigy_fused.enable_gradient_release(opt)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()  # with release, all parameters have been stepped after this
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, watched.most


def main():
    losses, most = train(release=False)
    released, least = train(release=True)
    print(f"gradients at the peak: {most / 1e6:.2f} MB; released: {least / 1e6:.2f} MB")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; released: {released[-1]:.4f}")
    if released != losses or least > most / LAYERS:
        raise SystemExit("release changed the numbers, or freed nothing")
    if losses[-1] > 0.5 * losses[0]:
        raise SystemExit("did not learn")


if __name__ == "__main__":
    main()
