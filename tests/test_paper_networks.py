"""The paper's experiments with networks: tasks on made-up data of the real data's shape, verdicts on made-up rows."""

import dataclasses
import functools
import importlib.util
import math

import pytest
import torch

if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "rich")):
    pytest.skip("needs the packages of the extra `demo`", allow_module_level=True)
from paper import experiments
from paper.networks import comparison as c
from paper.networks import sequences, tasks, training, vision
from shared import Corpus

TASKS = {
    "VGG": functools.partial(tasks.convolutional, "VGG"),
    "ResNet": functools.partial(tasks.convolutional, "ResNet"),
    "ViT": tasks.vit,
    "VarNet": tasks.varnet,
    "GPT": tasks.gpt,
    "RoBERTa": tasks.roberta,
    "LSTM": tasks.lstm,
    "DLRM": tasks.dlrm,
}


@pytest.fixture
def made_up(monkeypatch):
    """Random data in place of what the packages have."""
    random = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, generator=random)
    pictures, brains = torch.rand(1100, 1, 28, 28, generator=random), torch.rand(24, 64, 64, generator=random)
    spelling = torch.cat([torch.ones(1100, 1, dtype=torch.long), draw(3, 9, (1100, 4)), draw(0, 3, (1100, 2))], 1)
    people = (draw(0, 3, (11000, 4)), torch.randn(11000, 2, generator=random), draw(0, 8, (11000,)))
    text = "To be, or not to be, that is the question. " * 30
    monkeypatch.setattr(tasks, "digits", lambda: (pictures, draw(0, 10, (1100,))))
    monkeypatch.setattr(tasks, "slices", lambda: brains)
    monkeypatch.setattr(tasks, "words", lambda: ((spelling, spelling), 9, 9))
    monkeypatch.setattr(tasks, "accidents", lambda: (people, [3, 3, 3, 3]))
    monkeypatch.setattr(tasks, "corpus", lambda: Corpus(text))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains(made_up, name):
    """All weights get gradients, and the run's numbers are there."""
    task = TASKS[name](steps=2)
    gradients = []

    def loss(model, batch):
        gradients[:] = model.parameters()
        return task.loss(model, batch)

    found = training.train(dataclasses.replace(task, loss=loss), "Prodigy", 1.0, 0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gradients)
    assert sum(bool(p.grad.any()) for p in gradients) > 0.9 * len(gradients)
    assert found["steps"] == [1, 2]
    assert all(math.isfinite(value) for value in (*found["losses"], *found["tests"], *found["ds"], found["train"]))
    assert found["tests"][-1] == found["test"]["loss"]
    assert {"loss", "score"} == set(found["test"])


def line(start=0.0):
    """|x - 1|, from `start`; the test's loss is the distance."""

    class Point(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.tensor([start]))

    return training.Task(
        Point,
        lambda generator: iter(lambda: (torch.ones(1),), None),
        lambda model, batch: (model.x - batch[0]).abs().sum(),
        lambda model: {"loss": (value := (model.x - 1).abs().item()), "score": value},
        training.Recipe(200, "flat"),
    )


@pytest.mark.parametrize("method", training.MAKERS)
def test_every_method_gets_nearer(method):
    found = training.train(line(), method, 0.01 if method == "AdamW" else 1.0, 0)
    assert found["test"]["loss"] < 0.9
    assert found["average"] == found["test"] or method in ("DoG", "L-DoG")
    assert found["steps"][-1] == 200 and len(found["steps"]) == training.POINTS


def test_the_average_is_tested_and_the_last_iterate_kept():
    task, model = line(), line().model()
    opt = training.MAKERS["DoG"]([{"params": [model.x]}], 1e5, task.recipe)
    for _ in range(50):
        opt.zero_grad()
        task.loss(model, (torch.ones(1),)).backward()
        opt.step()
    last = model.x.item()
    average = opt.average()[0].item()
    assert average != last
    assert training.at_average(task, model, opt)["score"] == pytest.approx(abs(average - 1))
    assert model.x.item() == last


def test_a_run_that_diverges_ends_and_says_so():
    task = line()
    calls = []

    def loss(model, batch):
        calls.append(1)
        return task.loss(model, batch) * (math.nan if len(calls) > 20 else 1)

    found = training.train(dataclasses.replace(task, loss=loss), "AdamW", 0.01, 0)
    assert len(calls) == 21 and math.isnan(found["train"]) and found["steps"] == [10, 20]
    assert math.isnan(found["test"]["score"])


def test_gradients_of_micro_batches_are_averaged():
    recipe = training.Recipe(1, "flat", micro=4)
    task = dataclasses.replace(line(), recipe=recipe, loss=lambda model, batch: 3 * model.x.sum())
    model = task.model()
    training._step(task, model, torch.optim.SGD(model.parameters(), lr=1.0), task.batches(None))
    assert model.x.item() == -3


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("flat", (0.5, 1, 1, 1)),
        ("cosine", (0.5, 1, 0.5, 0)),
        ("linear", (0.5, 1, 0.5, 0)),
        ("step", (0.5, 1, 1, 0.1)),
        ("inverse-sqrt", (0.5, 1, math.sqrt(10 / 61), math.sqrt(10 / 111))),
    ],
)
def test_schedules(schedule, factors):
    recipe = training.Recipe(110, schedule, warmup=10)
    assert [training.factor(recipe, step) for step in (4, 9, 60, 110)] == pytest.approx(factors)


# -- the parts of the tasks --


def test_ssim():
    a, b = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert vision.ssim(a, a) == pytest.approx(1)
    assert vision.ssim(b, a) < 0.2
    shifted = vision.ssim(a + 0.1, a)
    assert 0.5 < shifted < 1 and vision.ssim(2 * a + 0.2, 2 * a) == pytest.approx(shifted.item(), abs=1e-5)


def test_scans_are_a_quarter_of_the_frequencies():
    pictures = torch.rand(50, 64, 64, generator=torch.Generator().manual_seed(0))
    k, mask, _ = tasks.scans(pictures, torch.Generator().manual_seed(1))
    assert mask.mean().item() == pytest.approx(0.25, abs=0.03)
    assert mask[:, :, :3].all() and mask[:, :, -2:].all()  # the middle, where torch has the lowest frequencies
    assert not k[mask == 0].any()
    whole = vision.to_frequencies(pictures * tasks.phases(50, 64, torch.Generator().manual_seed(1)))
    assert torch.equal(k[mask == 1], whole[mask == 1])


def test_varnet_returns_what_was_measured_whole():
    """With nothing to refine, and all frequencies measured, the picture is exact."""
    net = vision.VarNet()
    for part in net.refine:
        torch.nn.init.zeros_(part[-1].weight), torch.nn.init.zeros_(part[-1].bias)
    pictures = torch.rand(2, 16, 16)
    k = vision.to_frequencies(pictures.to(torch.complex64))
    assert torch.allclose(net(k, torch.ones(2, 16, 16)), pictures, atol=1e-5)


def test_a_sixth_of_the_tokens_is_hidden():
    tokens = torch.randint(1, 60, (400, 64))
    shown, hidden, same = sequences.mask(tokens, 60, torch.Generator().manual_seed(0))
    assert same is tokens and torch.equal(shown[~hidden], tokens[~hidden])
    assert hidden.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (shown[hidden] == 0).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown[hidden] == tokens[hidden]).float().mean().item() == pytest.approx(0.1 + 0.1 / 59, abs=0.02)


def test_translators_loss_knows_no_padding():
    torch.manual_seed(0)
    net = sequences.Translator(9, 9)
    source, target = torch.tensor([[1, 4, 5, 2, 0]]), torch.tensor([[1, 4, 5, 2, 0, 0]])
    assert net.loss(source, target).item() == pytest.approx(net.loss(source, target[:, :4]).item(), rel=1e-5)


# -- verdicts --


def rows_of(scores, **extra):
    """Rows of methods by (method, value): the scores of the seeds."""
    curves = {"steps": (1.0, 2.0), "losses": (2.0, 1.0), "tests": (2.0, 1.5), "ds": (0.1, 0.2)}
    return [
        {"method": method, "value": value, "seed": seed, "score": score, "average_score": score, "d": 0.01, **curves}
        | {"test_loss": score, "train_loss": score, **extra}
        for (method, value), own in scores.items()
        for seed, score in enumerate(own)
    ]


def test_tuned_adam_is_the_best_of_the_grid():
    rows = rows_of({("AdamW", 0.1): (90, 92), ("AdamW", 0.01): (93, 91), ("AdamW", 1): (99, math.nan)})
    assert c.compared(rows, "%")[c.TUNED][0]["value"] == 0.01
    assert c.compared(rows, "nats")[c.TUNED][0]["value"] == 0.1
    assert c.cell(c.compared(rows, "%")[c.TUNED], "score", 1) == "92.0 ± 1.4"
    unfinished = rows_of({("AdamW", 0.1): (90, 92), ("AdamW", 0.01): (99,)})
    assert c.compared(unfinished, "%")[c.TUNED][0]["value"] == 0.1


@pytest.mark.parametrize(
    ("scores", "unit", "margin", "holds"),
    [
        ((99.1, 100), "%", True, True),
        ((98.9, 100), "%", True, False),
        ((99.9, 100), "%", False, False),
        ((100.1, 100), "%", False, True),
        ((1.02, 1.0), "nats", True, True),
        ((1.04, 1.0), "nats", True, False),
        ((0.9, 1.0), "nats", False, True),
        ((1.1, 1.0), "nats", False, False),
        ((math.nan, 1.0), "nats", True, False),
        ((1.0, math.nan), "nats", False, True),
    ],
)
def test_close(scores, unit, margin, holds):
    ours, theirs = scores
    methods = c.compared(rows_of({("Prodigy", 1.0): (ours,), ("AdamW", 0.1): (theirs,)}), unit)
    verdict = c.close("claim", {"task": (methods, unit)}, c.TUNED, margin)
    assert verdict.holds is holds and verdict.seen.startswith(f"{int(holds)} of 1: task ")
    both = {"task": (methods, unit), "other": ({**methods, "Prodigy": methods[c.TUNED]}, unit)}
    if margin and not holds:
        assert c.close("claim", both, c.TUNED, margin).holds is None


def test_a_lead_within_the_standard_error_is_none():
    """The scores differ by 1 on the mean; the error is 0.5 and 1.5."""
    for spread, holds in ((0.5, True), (1.5, False)):
        scores = {("Prodigy", 1.0): (91 - spread, 91 + spread), ("AdamW", 0.1): (90.0, 90.0)}
        methods = c.compared(rows_of(scores), "%")
        assert c.error(methods["Prodigy"], methods[c.TUNED]) == pytest.approx(spread)
        assert c.close("claim", {"task": (methods, "%")}, c.TUNED, margin=False).holds is holds


@pytest.mark.parametrize("name", ["figure2", "figure3", "analogues"])
def test_experiments_report_what_they_have(name):
    """Of all runs, and of a few."""
    module = experiments.load(name)
    keys = list(module.runs(False))
    assert len({tuple(key.values()) for key in keys}) == len(keys) and set(keys[0]) == set(module.KEYS)
    rows = [{**rows_of({(key["method"], key["value"]): (90 + key["seed"],)})[0], **key} for key in keys]
    few = [row for row in rows if row["seed"] == 0 and row["method"] == "Prodigy"]
    figures = module.plot(rows)
    figures[""].canvas.draw()
    for some in (rows, few, []):
        assert bool(module.plot(some)) == bool(some)
        for header, *lines in module.tables(some).values():
            assert all(len(header) == len(line) and all(isinstance(cell, str) for cell in line) for line in lines)
        assert all(verdict.claim and verdict.seen for verdict in module.verdicts(some))
    assert all(verdict.holds in (True, False, None) for verdict in module.verdicts(rows))


def test_dogs_are_judged_by_the_better_iterate():
    module = experiments.load("figure2")
    rows = rows_of({("DoG", 1.0): (90.0,)}, network="VGG", average_score=93.0)
    assert "93.00" in str(module.tables(rows))


@pytest.mark.parametrize(("ours", "theirs", "holds"), [(2.42, 2.41, True), (2.41, 2.42, True), (2.3, 2.6, False)])
def test_the_same_is_neither_better_nor_worse(ours, theirs, holds):
    task = {"GPT": ({"Prodigy": [{"score": ours}], "D-Adapt Adam": [{"score": theirs}]}, "nats")}
    assert c.same("the same", task, "D-Adapt Adam").holds is holds


@pytest.mark.parametrize(("adapt", "holds"), [(97.4, None), (95.0, True), (90.0, True)])
def test_a_gap_is_closed_where_there_is_one(adapt, holds):
    scores = {"Prodigy": 97.6, "D-Adapt Adam": adapt, c.TUNED: 97.5}
    task = {"VGG": ({method: [{"score": score}] for method, score in scores.items()}, "%")}
    assert experiments.load("figure2")._closes_gap("closed", task).holds is holds
