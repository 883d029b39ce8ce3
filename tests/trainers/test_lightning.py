"""Lightning: configure_optimizers, clipping, mixed precision, a resumed checkpoint, a schedule."""

import lightning
import pytest
import torch
from torch import nn

from prodigy_fused import Prodigy

BATCHES, EPOCHS = 4, 2


class Module(lightning.LightningModule):
    def __init__(self, net, **options):
        super().__init__()
        self.net, self.options, self.losses, self.estimates = net, {"d0": 1e-3, **options}, [], []

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        self.estimates.append(self.optimizers().d)
        return loss

    def configure_optimizers(self):
        opt = Prodigy(self.parameters(), **self.options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(problem, folder, epochs=EPOCHS, resume=None, options=None, **more):
    net, batches = problem
    module = Module(net(), **(options or {}))
    run = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=str(folder), **more,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches(BATCHES), batch_size=None, shuffle=False)
    run.fit(module, loader, ckpt_path=resume)
    return run, module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("option", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}], ids=str)
def test_resumed(problem, tmp_path, precision, option):
    """A run resumed from its checkpoint ends with the bits of one that was not interrupted.

    Not so with "64-true": Lightning loads the weights before it makes the module float64, whatever the optimizer.
    """
    _, whole = fit(problem, tmp_path, precision=precision, **option)
    assert whole.trainer.optimizers[0].step_count == EPOCHS * BATCHES // option.get("accumulate_grad_batches", 1)
    half, _ = fit(problem, tmp_path, EPOCHS // 2, precision=precision, **option)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(problem, tmp_path, EPOCHS, tmp_path / "half.ckpt", precision=precision, **option)
    tolerance = 1e-6 if precision == "64-true" else 0.0
    assert whole.trainer.optimizers[0].d > 1e-3
    assert resumed.trainer.optimizers[0].d == pytest.approx(whole.trainer.optimizers[0].d, rel=tolerance)
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_with_fused_true(problem, tmp_path, precision):
    """Lightning refuses it under mixed precision, as for torch's fused optimizers; fused=None is as fast, and clips."""
    settings = {"precision": precision, "gradient_clip_val": 0.5}
    if precision == "bf16-mixed":
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(problem, tmp_path, options={"fused": True}, **settings)
    else:
        fit(problem, tmp_path, options={"fused": True}, **settings)
    _, module = fit(problem, tmp_path, options={"fused": None}, **settings)
    opt = module.trainer.optimizers[0]
    assert opt._runtime.plans.keys[0].backend == "cpu"
    assert opt.d > 1e-3


def test_fused_true_without_clipping(problem, tmp_path):
    _, module = fit(problem, tmp_path, options={"fused": True}, precision="bf16-mixed")
    assert module.trainer.optimizers[0].d > 1e-3


def test_what_is_logged(problem, tmp_path):
    """``self.optimizers()`` wraps the optimizer, and shows its properties."""
    _, module = fit(problem, tmp_path)
    assert module.estimates[0] == 1e-3
    assert module.estimates == sorted(module.estimates)
    assert module.estimates[-1] > 1e-3
