"""The record of a race: what each optimizer's training run has noted, and its figures as plain numbers."""

import dataclasses
import pathlib
import statistics

import machine
import torch

REFERENCE = "prodigyopt"


@dataclasses.dataclass
class TrainingRun:
    """One optimizer, its own copy of the model, and what was recorded of them (one entry per step)."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list = dataclasses.field(default_factory=list)
    d: list = dataclasses.field(default_factory=list)
    optimizer_ms: list = dataclasses.field(default_factory=list)
    step_ms: list = dataclasses.field(default_factory=list)
    val: list = dataclasses.field(default_factory=list)  # pairs (step, loss)
    train_loss: float = float("nan")

    @property
    def label(self):
        """The name as tables and legends show it."""
        if self.name == "adamw":
            return f"AdamW, lr {self.schedule.base_lrs[0]:g}"
        return self.name

    @property
    def recent_loss(self):
        """The mean training loss of the last 20 batches."""
        return statistics.fmean(self.losses[-20:])


def summary(runs, args, seconds):
    """Returns all figures of the race as plain numbers, ready for JSON."""
    reference = [statistics.median(run.optimizer_ms) for run in runs if run.name == REFERENCE]
    results = {}
    for run in runs:
        # Medians: the first steps allocate the state, and other programs take the processor now and then.
        optimizer_ms, step_ms = statistics.median(run.optimizer_ms), statistics.median(run.step_ms)
        results[run.name] = {
            "label": run.label,
            "train_loss": run.train_loss,
            "val_loss": run.val[-1][1],
            "last_batch_loss": run.losses[-1],
            "d": run.d[-1] if run.d else None,
            "optimizer_ms": optimizer_ms,
            # Far below the median: the machine was busy, which hits the longer steps of the reference most.
            "optimizer_ms_fastest_tenth": sorted(run.optimizer_ms)[len(run.optimizer_ms) // 10],
            "step_ms": step_ms,
            "optimizer_share": optimizer_ms / step_ms,
            "speedup_over_reference": reference[0] / optimizer_ms if reference else None,
        }
    numels = [parameter.numel() for parameter in runs[0].model.parameters()]
    return {
        "machine": machine.describe(args.device),
        "options": {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()},
        "parameters": sum(numels),
        "tensors": len(numels),
        "seconds": seconds,
        "optimizers": results,
    }


def chip(figures):
    """Returns the name of the processor that did the work, for captions."""
    where = figures["machine"]
    return where["gpu"] or f"{where['cpu']}, {where['threads']} thread{'s' * (where['threads'] > 1)}"
