"""Every backend takes the reference's steps (docs/algorithm.md, "What correct means")."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from oracle import STEPS, Algorithm4, Case, Prodigyopt, Recording, record, replay, training, worst

TOLERANCE = 1e-10  # float64, relative, of d and of every parameter
FACTOR = 2.0  # float32: the error against float64 may be this many times prodigyopt's

D0 = 1e-6

FACTORS = {
    "betas": [(0.9, 0.999), (0.9, 0.99), (0.0, 0.999)],
    "beta3": [None, 0.95],
    "use_bias_correction": [False, True],
    "decay": [{}, {"weight_decay": 0.05}, {"weight_decay": 0.01, "decouple": False}],
    "safeguard_warmup": [False, True],
    "growth_rate": [float("inf"), 1.05],
    "d_coef": [1.0, 0.5, 2.0],
    "slice_p": [1, 2, 11],
    "eps": [1e-8, 1e-3],
    "schedule": ["constant", "warm-up from 0", "0 in the middle", "cosine"],
    "arrival": ["always", "late", "now and then"],
    "groups": ["one", "three", "one frozen", "one asleep"],
}


def pairs(levels: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(levels), 2))


def covering(count: int) -> list[tuple[int, ...]]:
    """``count`` combinations of the factors' levels, in which every pair of levels of two factors meets.

    Greedy: of some random combinations, the one with the most pairs that are rare so far.
    """
    draw = random.Random(1)
    sizes = [len(levels) for levels in FACTORS.values()]
    rows, met = [], dict.fromkeys(
        (((i, a), (j, b)) for i, j in itertools.combinations(range(len(sizes)), 2)
         for a, b in itertools.product(range(sizes[i]), range(sizes[j]))), 0)  # fmt: skip
    for _ in range(count):
        candidates = [tuple(map(draw.randrange, sizes)) for _ in range(200)]
        rows.append(max(candidates, key=lambda row: sum(0.1 ** met[pair] for pair in pairs(row))))
        for pair in pairs(rows[-1]):
            met[pair] += 1
    assert min(met.values()) > 0, "give covering() more rows"
    return rows


def case_of(row: tuple[int, ...]) -> Case:
    chosen = {name: levels[i] for (name, levels), i in zip(FACTORS.items(), row, strict=True)}
    how = {name: chosen.pop(name) for name in ("schedule", "arrival", "groups")}
    return Case({**chosen.pop("decay"), **chosen}, **how)


DEFAULT = (0,) * len(FACTORS)
CASES = {"".join(map(str, row)): case_of(row) for row in [DEFAULT, *covering(22)]}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def recorded(request) -> Callable[[int], Recording]:
    """So many steps of a case; slow backends take few."""

    def of(steps: int) -> Recording:
        run = record(dataclasses.replace(request.param, steps=steps))
        # A case that never leaves d0, or blows up, would test nothing. How far it comes depends on the machine.
        assert np.isfinite(run.x).all() and (steps < STEPS or run.d[-1] > 2 * D0)
        return run

    return cache(of)


def relative(run: Recording, d: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The errors after each step: of d, and of each tensor relative to its largest element (tensors, steps)."""
    cuts = np.cumsum([p.numel() for p in run.start])[:-1]
    tensors = zip(np.split(x, cuts, 1), np.split(run.x, cuts, 1), strict=True)
    return np.abs(d / run.d - 1), np.array([[*map(worst, ours, theirs)] for ours, theirs in tensors])


def test_float64(recorded, backend):
    run = recorded(backend.steps(STEPS))
    d, x, opt = replay(backend, run, torch.float64, backend.device)
    error_d, error_x = relative(run, d, x)
    assert error_d.max() <= TOLERANCE
    assert error_x.max() <= TOLERANCE
    assert opt.corrections == np.count_nonzero(np.diff(d, prepend=D0))


def test_the_numpy_oracle(recorded):
    run = recorded(STEPS)
    d, x, _ = replay(Algorithm4, run, torch.float64)
    assert max(map(np.max, relative(run, d, x))) <= TOLERANCE


# -- float32 -----------------------------------------------------------------------------------------------------------

FLOAT32_CASES = [
    Case(),
    Case({"betas": (0.9, 0.99), "use_bias_correction": True, "weight_decay": 0.05}, seed=1),
    Case({"betas": (0.0, 0.999), "slice_p": 11}, seed=2),
    Case({"slice_p": 2, "safeguard_warmup": True}, "warm-up from 0", groups="three", seed=3),
]
# A few units in the last place: below this, twice the error of prodigyopt says nothing.
FLOOR = 4 * torch.finfo(torch.float32).eps


@cache
def float32_runs(steps: int) -> list[tuple[Recording, np.ndarray, np.ndarray]]:
    """Returns the oracle's run on gradients that float32 can hold, and prodigyopt's with them in float32."""
    runs = []
    for case in FLOAT32_CASES:
        run = record(dataclasses.replace(case, steps=steps))
        start = [p.float().double() for p in run.start]
        grads = [[None if g is None else g.float().double() for g in step] for step in run.grads]
        run = dataclasses.replace(run, start=start, grads=grads)
        d, x, _ = replay(Prodigyopt, run, torch.float64)
        run = dataclasses.replace(run, d=d, x=x)
        runs.append((run, *replay(Prodigyopt, run, torch.float32)[:2]))
    return runs


def errors(run: Recording, d: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Over the whole run: the largest error of d, and the root mean square error of each tensor."""
    error_d, error_x = relative(run, d, x)
    return np.maximum([error_d.max(), *np.sqrt((error_x**2).mean(1))], FLOOR)


def test_float32(backend):
    ratios = []
    for run, their_d, their_x in float32_runs(backend.steps(300)):
        d, x, _ = replay(backend, run, torch.float32, backend.device)
        ratios.append(errors(run, d, x) / errors(run, their_d, their_x))
    # One rounding of x in the first steps, where x0 - x is a few of its last bits, can treble the errors of a run, or
    # another's: the mean over the runs is what tells.
    assert np.exp(np.log(ratios).mean(0)).max() <= FACTOR
    assert np.max(ratios) <= 3 * FACTOR


# -- the second pass ---------------------------------------------------------------------------------------------------


def test_corrections_are_rare(backend):
    steps = backend.steps(400)
    model, loss = training(0, torch.float32, backend.device)
    opt = backend(model.parameters())
    moved, last = 0, opt.d
    for k in range(steps):
        opt.zero_grad()
        loss(k).backward()
        opt.step()
        moved, last = moved + (opt.d != last), opt.d
    assert last > (1e-3 if steps > 15 else 1e-4)  # so many are what the interpreter of Triton takes
    assert opt.corrections == moved
    assert moved < max(0.05 * steps, 25)


def test_a_step_that_leaves_d_alone_has_one_pass(backend, monkeypatch):
    if not backend.one_pass:
        pytest.skip("makes x in its second pass")
    model, loss = training(0, torch.float32, backend.device)
    opt = backend(model.parameters())
    written = []

    def train(k):
        opt.zero_grad()
        loss(k).backward()
        opt.step()

    train(0)  # the first step is made by `finish` (its x must not move as long as every gradient is zero)
    plan = type(opt._runtime.plans.plans[0][0])
    finish = plan.finish

    def watched(self, *args, **kwargs):
        before = [p.detach().clone() for p in model.parameters()]
        finish(self, *args, **kwargs)
        written.append(not all(map(torch.equal, before, model.parameters())))

    monkeypatch.setattr(plan, "finish", watched)
    for k in range(1, backend.steps(150)):
        d = opt.d
        train(k)
        assert written.pop() == (opt.d != d)
    assert 0 < opt.corrections < backend.steps(150) - 1
