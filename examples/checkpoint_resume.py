"""Checkpoints: a run that was saved and resumed goes on exactly as the one that never stopped.

    python examples/checkpoint_resume.py

A checkpoint of `prodigyopt.Prodigy` loads, too, in the middle of a run (this part needs `pip install prodigyopt`).
"""

import copy
import io

import torch
from torch import nn

from prodigy_fused import Prodigy


def train(model, opt, steps=150):
    """Takes `steps` steps on the same data; returns the last loss."""
    x = torch.linspace(-2, 2, 256)[:, None]
    for _ in range(steps):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), torch.sin(2 * x))
        loss.backward()
        opt.step()
    return loss.item()


def resume_and_compare(model, opt):
    """Trains, saves, resumes as a fused Prodigy, and goes on with both; returns their losses."""
    train(model, opt)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = copy.deepcopy(model)
    resumed.load_state_dict(saved["model"])
    resumed_opt = Prodigy(resumed.parameters())
    resumed_opt.load_state_dict(saved["optimizer"])

    losses = train(model, opt), train(resumed, resumed_opt)
    print(f"  without a stop: loss {losses[0]:.3e}, d {opt.param_groups[0]['d']:.4e}")
    print(f"  resumed:        loss {losses[1]:.3e}, d {resumed_opt.d:.4e}")
    return losses


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    twin = copy.deepcopy(model)

    print("prodigy_fused to prodigy_fused:")
    losses = resume_and_compare(model, Prodigy(model.parameters()))
    if losses[0] != losses[1] or losses[0] > 0.01:
        raise SystemExit("did not learn, or the resumed run differs")

    print("prodigyopt to prodigy_fused:")
    try:
        import prodigyopt
    except ImportError:
        print("  not tried: prodigyopt is not installed (pip install prodigyopt)")
        return
    losses = resume_and_compare(twin, prodigyopt.Prodigy(twin.parameters()))
    if max(losses) > 0.01:
        raise SystemExit("did not learn")


if __name__ == "__main__":
    main()
