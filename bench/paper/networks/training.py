"""Training a task with any of the compared optimizers, and the record of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prodigy_fused import Prodigy
from prodigy_fused.convex import DAdaptAdam, DoG, LDoG

POINTS = 20  # of a curve
CORRECTED = "Prodigy, bias correction"  # Algorithm 4 has none; an option of the authors' package
REFERENCE = "prodigyopt"
Batch = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task is trained, by whatever optimizer.

    Args:
        steps: number of steps.
        schedule: of the learning rate, a key of SCHEDULES.
        warmup: steps in which the learning rate rises from 0.
        betas: decays of Adam's moments, also of Prodigy's and D-Adaptation's.
        weight_decay: decoupled, of matrices only.
        clip: the largest norm of the gradients.
        micro: batches of which the gradients are accumulated to a step's.
    """

    steps: int
    schedule: str
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = math.inf
    micro: int = 1


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        model: makes it; torch's seed decides the weights.
        batches: yields batches for ever, which the generator chooses.
        loss: of the model and a batch.
        test: the numbers of a model on data that it was not trained on, `loss` among them.
        recipe: how it is trained.
    """

    model: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    test: Callable[[nn.Module], dict[str, float]]
    recipe: Recipe


# Factor of the learning rate after the warm-up, by the share of the steps that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "flat": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "step": lambda done: 1.0 if done < 0.8 else 0.1,
}


def factor(recipe: Recipe, step: int) -> float:
    """Returns the factor of the learning rate at a step, counted from 0."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "inverse-sqrt":
        return math.sqrt(recipe.warmup / (step + 1))
    return SCHEDULES[recipe.schedule]((step - recipe.warmup) / (recipe.steps - recipe.warmup))


# name: makes it from the parameter groups, the value of its one setting, and what the recipe says of Adam's
Maker = Callable[[list[dict[str, Any]], float, Recipe], torch.optim.Optimizer]


def _adam(groups: list[dict[str, Any]], value: float, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=value, betas=recipe.betas)


def _prodigy(**option: bool) -> Maker:
    def make(groups: list[dict[str, Any]], value: float, recipe: Recipe) -> torch.optim.Optimizer:
        # As the authors advise where the learning rate is warmed up; all else is the default.
        warm = recipe.warmup > 0
        return Prodigy(groups, d_coef=value, betas=recipe.betas, safeguard_warmup=warm, fused=True, **option)

    return make


def _reference(groups: list[dict[str, Any]], value: float, recipe: Recipe) -> torch.optim.Optimizer:
    import prodigyopt  # here, since one experiment only has it

    return prodigyopt.Prodigy(groups, d_coef=value, betas=recipe.betas, safeguard_warmup=recipe.warmup > 0)


def _d_adapt(groups: list[dict[str, Any]], value: float, recipe: Recipe) -> torch.optim.Optimizer:
    return DAdaptAdam(groups, lr=value, betas=recipe.betas, decouple=True)


def _dog(groups: list[dict[str, Any]], value: float, recipe: Recipe) -> torch.optim.Optimizer:
    params = [p for group in groups for p in group["params"]]
    norm = math.sqrt(sum(p.detach().double().square().sum().item() for p in params))
    return DoG(params, d0=value * 1e-6 * (1 + norm))


def _l_dog(groups: list[dict[str, Any]], value: float, recipe: Recipe) -> torch.optim.Optimizer:
    if value != 1.0:
        raise ValueError("L-DoG has one first distance for each parameter, its own")
    return LDoG([p for group in groups for p in group["params"]])


# The setting: the learning rate of AdamW; of the others a factor, 1 by default: of the estimate (Prodigy's d_coef), of
# the learning rate (D-Adapt Adam's lr), of the first distance (DoG).
MAKERS: dict[str, Maker] = {
    "Prodigy": _prodigy(),
    CORRECTED: _prodigy(use_bias_correction=True),
    REFERENCE: _reference,
    "D-Adapt Adam": _d_adapt,
    "AdamW": _adam,
    "DoG": _dog,
    "L-DoG": _l_dog,
}


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns parameter groups: matrices are decayed, vectors are not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def estimate(opt: torch.optim.Optimizer) -> float:
    """Returns what the optimizer takes for the distance; of Adam, the learning rate that it was given."""
    # prodigyopt has it in its groups.
    return float(opt.d if hasattr(opt, "d") else opt.param_groups[0].get("d", opt.defaults["lr"]))


@torch.no_grad()
def at_average(task: Task, model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, float]:
    """Returns the test's numbers at the average of the iterates."""
    params = [p for group in opt.param_groups for p in group["params"]]
    last = [p.clone() for p in params]
    torch._foreach_copy_(params, opt.average())
    try:
        return task.test(model)
    finally:
        torch._foreach_copy_(params, last)


def train(task: Task, method: str, value: float, seed: int) -> dict[str, Any]:
    """Trains a task.

    Args:
        task: what, and how.
        method: the optimizer, a key of MAKERS.
        value: its setting.
        seed: of the weights and of the batches.

    Returns:
        `test`, the test's numbers at the end, `average`, the same at the average iterate, `train`, the mean loss of the
        last twentieth of the batches, `d`; and curves by the number of steps, `steps`: `losses` (of the batches since
        the last point), `tests` (test loss), `ds`. Numbers that are not finite mean that it diverged, and then it ends.
    """
    torch.manual_seed(seed)
    model, recipe = task.model(), task.recipe
    opt = MAKERS[method](groups_of(model, recipe.weight_decay), value, recipe)
    base = [group.get("lr", 1.0) for group in opt.param_groups]
    batches = task.batches(torch.Generator().manual_seed(seed))
    marks = {round(recipe.steps * (i + 1) / POINTS) for i in range(POINTS)}
    curves: dict[str, list[Any]] = {"steps": [], "losses": [], "tests": [], "ds": []}
    losses: list[float] = []
    for step in range(recipe.steps):
        for group, lr in zip(opt.param_groups, base, strict=True):
            if "lr" in group:  # DoG has none
                group["lr"] = lr * factor(recipe, step)
        losses.append(_step(task, model, opt, batches))
        if not math.isfinite(losses[-1]):
            break
        if step + 1 in marks:
            last = curves["steps"][-1] if curves["steps"] else 0
            curves["steps"].append(step + 1)
            curves["losses"].append(_mean(losses[last:]))
            curves["tests"].append(_test(task, model)["loss"])
            curves["ds"].append(estimate(opt))
    test = _test(task, model)
    average = at_average(task, model, opt) if hasattr(opt, "average") else test
    train_loss = _mean(losses[-max(1, recipe.steps // 20) :])
    if not math.isfinite(train_loss):
        test = average = dict.fromkeys(test, math.nan)
    return {"test": test, "average": average, "train": train_loss, "d": estimate(opt), **curves}


def _step(task: Task, model: nn.Module, opt: torch.optim.Optimizer, batches: Iterator[Batch]) -> float:
    """Takes one step, and returns the loss before it; none if that is not finite."""
    opt.zero_grad()
    total = 0.0
    for _ in range(task.recipe.micro):
        loss = task.loss(model, next(batches)) / task.recipe.micro
        loss.backward()
        total += loss.item()
    if math.isfinite(task.recipe.clip):
        nn.utils.clip_grad_norm_(model.parameters(), task.recipe.clip)
    if math.isfinite(total):
        opt.step()
    return total


@torch.no_grad()
def _test(task: Task, model: nn.Module) -> dict[str, float]:
    return task.test(model)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
