"""End to end: tokens per second of the demo's GPT with each optimizer, and the optimizer's share of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import Racer, Sample, time_on_cpu, uncollected
from peers import Peer
from shared import GPT

# The demo's model and batch, on random characters: the time of a step does not depend on the text.
SIZES = {"vocabulary": 90, "block": 64, "layers": 4, "heads": 4, "embd": 128}
BATCH, WARM_UP = 12, 5


@dataclass
class Trainer:
    """A racer, its model, and the milliseconds of forward and backward."""

    racer: Racer
    model: Any
    train_ms: list[float] = field(default_factory=list)


def time_training(work: Callable[[], Any], device: torch.device) -> float:
    """Returns the milliseconds that `work` takes, the device's part included."""

    def waited() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return time_on_cpu(waited).ms


def step(trainer: Trainer, tokens: Any, device: torch.device) -> tuple[float, float]:
    """Takes one training step; returns the milliseconds of forward and backward, and of the optimizer."""

    def forward_backward() -> None:
        trainer.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()

    trainer.racer.optimizer.zero_grad()
    return time_training(forward_backward, device), time_training(trainer.racer.optimizer.step, device)


def train(
    peers: list[Peer], device: torch.device, rounds: int, tick: Callable[[], Any] = lambda: None
) -> list[Trainer]:
    """Trains a copy of one model with every peer, in turn, on the same batches.

    Args:
        rounds: timed steps of each.
        tick: called after every turn.
    """
    torch.manual_seed(0)
    model = GPT(**SIZES).to(device)
    trainers = [Trainer(Racer(peer.name, peer), copy.deepcopy(model)) for peer in peers]
    for trainer in trainers:
        with trainer.racer.trying():
            trainer.racer.optimizer = trainer.racer.peer.make(list(trainer.model.parameters()))
    with uncollected():
        for turn in range(WARM_UP + rounds):
            tokens = torch.randint(SIZES["vocabulary"], (BATCH, SIZES["block"] + 1), device=device)
            for trainer in (t for t in trainers if t.racer.status == "ok"):
                with trainer.racer.trying():
                    training, optimizer = step(trainer, tokens, device)
                    if turn >= WARM_UP:
                        trainer.train_ms.append(training)
                        trainer.racer.samples.append(Sample(optimizer))
            tick()
    return trainers
