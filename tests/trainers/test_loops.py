"""Loops that imitate those of diffusers' scripts, of kohya's sd-scripts and of OneTrainer, which are not installed."""

import ast
import copy
import importlib

import accelerate
import pytest
import torch
from torch import nn

from prodigy_fused import Prodigy

STEPS, HALF = 8, 4


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate's settings belong to the process."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


class Lora(nn.Module):
    """A frozen layer and its trained low-rank factors, of which ``up`` starts at 0."""

    def __init__(self, dtype=torch.float32, rank=2):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, 4).to(dtype))
        self.up = nn.Parameter(torch.zeros(4, rank, dtype=dtype))

    def forward(self, x):
        return self.base(x) + (x.to(self.down.dtype) @ self.down.T @ self.up.T).to(x.dtype)


def loss_of(unet, text, batch):
    x, y = batch
    return nn.functional.mse_loss(unet(text(x)).sum(1, keepdim=True), y)


def by_name(name, params, arguments, lr):
    """Returns an optimizer from a dotted name and words "key=value", as sd-scripts does."""
    module, _, cls = name.rpartition(".")
    options = {key: ast.literal_eval(value) for key, _, value in (word.partition("=") for word in arguments)}
    return getattr(importlib.import_module(module), cls)(params, lr=lr, **options)


ARGUMENTS = ["d0=1e-3", "decouple=True", "weight_decay=0.01", "use_bias_correction=True", "betas=(0.9, 0.99)"]


def sd_scripts(batches, dtype=torch.float32, resume=None, save=None, begin=0, name="prodigy_fused.Prodigy"):
    """Trains two networks as sd-scripts does, the text encoder's at half the rate; returns them and what was logged."""
    accelerator = accelerate.Accelerator(cpu=True)
    unet, text = Lora(dtype), Lora(dtype)
    groups = [
        {"params": [text.down, text.up], "lr": 0.5},
        {"params": [unet.down, unet.up], "lr": 1.0},
    ]
    optimizer = by_name(name, groups, ARGUMENTS, lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    unet, text, optimizer, scheduler = accelerator.prepare(unet, text, optimizer, scheduler)
    if resume is not None:
        accelerator.load_state(resume)
    logs = []
    for batch in batches(STEPS)[begin:]:
        accelerator.backward(loss_of(unet, text, batch))
        accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        logged = scheduler.optimizers[-1].param_groups
        logs.append([float(group["d"] * group["lr"]) for group in logged])
        if save is not None and len(logs) == HALF:
            accelerator.save_state(save)
    return [unet.down, unet.up, text.down, text.up], logs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sd_scripts(problem, tmp_path, dtype):
    whole, logs = sd_scripts(problem[1], dtype, save=str(tmp_path / "half"))
    assert all(text == 0.5 * unet for text, unet in logs)
    assert logs[-1][1] > 1e-3
    resumed, rest = sd_scripts(problem[1], dtype, resume=str(tmp_path / "half"), begin=HALF)
    assert rest == logs[HALF:]
    assert all(map(torch.equal, whole, resumed))


def test_prodigyopt_refuses_two_learning_rates(problem):
    """Which is why scripts that were written for it set all groups to one."""
    with pytest.raises(RuntimeError, match="lr"):
        sd_scripts(problem[1], name="prodigyopt.Prodigy")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_diffusers(problem, precision):
    """Factors in float32 under autocast, accumulated gradients, a constant schedule with a warm-up from 0."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    unet, text = Lora(), Lora().requires_grad_(False)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = Prodigy(
        trained, lr=1.0, betas=(0.9, 0.999), beta3=None, weight_decay=1e-4, eps=1e-8, decouple=True,
        use_bias_correction=True, safeguard_warmup=True, d0=1e-3,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    unet, optimizer, scheduler = accelerator.prepare(unet, optimizer, scheduler)
    losses = []
    for batch in 8 * problem[1](4):
        with accelerator.accumulate(unet):
            loss = loss_of(unet, text, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4])
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.optimizer.d > 1e-3


def test_onetrainer(problem):
    """A resumed run writes the learning rates of its groups into the saved ones, and loads them."""
    unet, text = Lora(), Lora()

    def optimizer(saved=None):
        groups = [{"params": [net.down, net.up], "lr": lr, "initial_lr": lr} for net, lr in ((unet, 1.0), (text, 0.25))]
        made = Prodigy(groups, lr=1.0, d0=1e-3, use_bias_correction=True, decouple=True, fsdp_in_use=False)
        if saved is not None:
            for group, own in zip(saved["param_groups"], groups, strict=True):
                group["lr"], group["initial_lr"] = own["lr"], own["initial_lr"]
            made.load_state_dict(saved)
        return made

    def train(opt, batches):
        for batch in batches:
            loss_of(unet, text, batch).backward()
            opt.step()
            opt.zero_grad(set_to_none=True)

    opt = optimizer()
    train(opt, problem[1](STEPS)[:HALF])
    saved, weights = (
        copy.deepcopy(opt.state_dict()),
        [p.detach().clone() for p in (*unet.parameters(), *text.parameters())],
    )
    train(opt, problem[1](STEPS)[HALF:])
    ended = [p.detach().clone() for p in (*unet.parameters(), *text.parameters())]

    for group in saved["param_groups"]:
        group["lr"] = 0.0  # where a schedule had been
    with torch.no_grad():
        for p, w in zip((*unet.parameters(), *text.parameters()), weights, strict=True):
            p.copy_(w)
    again = optimizer(saved)
    assert [group["lr"] for group in again.param_groups] == [1.0, 0.25]
    train(again, problem[1](STEPS)[HALF:])
    assert again.d == opt.d > 1e-3
    assert all(map(torch.equal, ended, (*unet.parameters(), *text.parameters())))
