"""Accelerate: prepare, mixed precision, gradient accumulation, save_state and load_state."""

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


class Run:
    """A training loop as Accelerate's documentation has it."""

    def __init__(self, problem, precision="no", accumulation=1, fused=None, clip=None):
        net, self.batches = problem
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation
        )
        model, self.clip = net(), clip
        opt = Prodigy(model.parameters(), d0=1e-3, weight_decay=0.01, fused=fused)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        self.model, self.opt, self.schedule = self.accelerator.prepare(model, opt, schedule)
        self.losses = []

    def train(self, begin, end):
        for x, y in self.batches(STEPS)[begin:end]:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                if self.clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.opt.step()
                self.schedule.step()
                self.opt.zero_grad()
            self.losses.append(loss.item())

    def end(self):
        return [self.opt.optimizer.d, *(p.tolist() for p in self.model.parameters())]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resumed(problem, tmp_path, precision, accumulation, clip, fused):
    """A run resumed by load_state ends with the bits of one that was not interrupted."""
    whole = Run(problem, precision, accumulation, fused, clip)
    whole.train(0, HALF)
    whole.accelerator.save_state(str(tmp_path / "half"))
    whole.train(HALF, STEPS)
    assert whole.opt.optimizer.d > 1e-3
    assert whole.opt.optimizer.step_count == STEPS // accumulation

    resumed = Run(problem, precision, accumulation, fused, clip)
    resumed.accelerator.load_state(str(tmp_path / "half"))
    resumed.train(HALF, STEPS)
    assert resumed.end() == whole.end()
    assert resumed.losses == whole.losses[HALF:]


def test_accumulated_micro_batches_are_one_batch(problem):
    """Two halves of a batch make the step of the whole."""
    net, batches = problem

    def halves(count):
        return [half for x, y in batches(count // 2) for half in zip(x.split(4), y.split(4), strict=True)]

    run = Run((net, halves), accumulation=2)
    run.train(0, 8)
    plain = Prodigy((model := net()).parameters(), d0=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 10)
    for x, y in batches(4):
        plain.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        plain.step()
        schedule.step()
    assert run.opt.optimizer.d == pytest.approx(plain.d, rel=1e-4)
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_what_is_logged(problem):
    """The wrapper shows the groups; the estimate as a property is on the optimizer in it."""
    run = Run(problem)
    run.train(0, STEPS)
    group = run.opt.param_groups[0]
    assert float(group["d"]) == run.opt.optimizer.d
    assert group["d"] * group["lr"] > 0
    assert not run.opt.step_was_skipped
