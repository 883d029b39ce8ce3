"""Gradient accumulation: a step after every 4 micro-batches, as if the batch had been 4 times as large.

    python examples/gradient_accumulation.py

A twin trained on the whole batches, from the same start, arrives at the same loss and the same d up to rounding.
"""

import copy

import torch
from torch import nn

from prodigy_fused import Prodigy

STEPS, MICRO_BATCHES, BATCH = 200, 4, 128


def train(model, batches, micro_batches):
    """Trains `model`, each batch split into `micro_batches`; returns the last loss and d."""
    opt = Prodigy(model.parameters())
    for x, y in batches:
        opt.zero_grad()
        total = 0.0
        for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            # Divided, because backward() adds up: the gradient must be that of the mean over the whole batch.
            loss = nn.functional.mse_loss(model(part), target) / micro_batches
            loss.backward()
            total += loss.item()
        opt.step()
    return total, opt.d


def main():
    torch.manual_seed(0)
    teacher = nn.Linear(16, 4)
    inputs = torch.randn(STEPS, BATCH, 16)
    batches = [(x, teacher(x).detach()) for x in inputs]
    model = nn.Linear(16, 4)
    twin = copy.deepcopy(model)

    loss, d = train(model, batches, MICRO_BATCHES)
    whole_loss, whole_d = train(twin, batches, 1)
    print(f"{MICRO_BATCHES} micro-batches of {BATCH // MICRO_BATCHES}: loss {loss:.2e}, d {d:.4e}")
    print(f"whole batches of {BATCH}:    loss {whole_loss:.2e}, d {whole_d:.4e}")

    if not (loss < 1e-2 and abs(d - whole_d) < 0.05 * whole_d):
        raise SystemExit("did not learn, or not as with whole batches")


if __name__ == "__main__":
    main()
