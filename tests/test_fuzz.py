"""A few steps of anything, against both oracles; whatever a user may combine and no table thought of."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Algorithm4, Pair, Prodigyopt
from test_shapes import ANY, DENSE
from torch import Tensor

TOLERANCE = 1e-9
STEPS = 6

some = st.sampled_from
common = st.fixed_dictionaries(
    {
        "betas": st.tuples(some([0.0, 0.5, 0.9]), some([0.0, 0.9, 0.99, 0.999])),
        "beta3": st.none() | st.floats(0, 0.999),
        "decouple": st.booleans(),
        "use_bias_correction": st.booleans(),
        "safeguard_warmup": st.booleans(),
        "maximize": st.booleans(),
        "d0": some([1e-4, 1e-3, 0.1, 1.0]),
        "d_coef": st.floats(0.1, 3),
        "growth_rate": some([math.inf, 1.0]) | st.floats(1, 2),
    }
)
own = st.fixed_dictionaries(
    {
        "eps": some([1e-8, 1e-3, 1.0]),
        "weight_decay": some([0.0]) | st.floats(1e-3, 0.3),
        "slice_p": some([1, 1, 2, 3, 7, 11, 1000]),
    }
)
shape = st.lists(st.integers(0, 5) | some([1, 1, 17]), max_size=4).filter(lambda s: math.prod(s) < 2000)
# How a tensor starts (0: all zero), how large its gradients are (0: zero), and in which steps it has one.
scale = some([0.0, 0.1, 1.0, 1.0])
presence = st.lists(some([True, True, True, False]), min_size=STEPS, max_size=STEPS)


@dataclass
class Problem:
    options: dict[str, Any]
    groups: list[dict[str, Any]]
    layouts: list[tuple[str, str]]
    grad_scales: list[float]
    presences: list[list[bool]]
    lrs: list[list[float]]  # of each step, of each group
    seed: int


@st.composite
def problems(draw, layouts: list[str]) -> Problem:
    seed = draw(st.integers(0, 1000))
    values = torch.Generator().manual_seed(seed)
    groups = [{**draw(own), "params": []} for _ in range(draw(st.integers(1, 3)))]
    count = 0
    for group in groups:
        for s in draw(st.lists(shape, min_size=1, max_size=4)):
            group["params"].append(draw(scale) * torch.randn(s, generator=values, dtype=torch.float64))
            count += 1
    lr = some([1.0, 1.0, 0.3, 0.0])
    equal = draw(st.booleans())
    lrs = [[draw(lr)] * len(groups) if equal else [draw(lr) for _ in groups] for _ in range(STEPS)]
    return Problem(
        draw(common), groups,
        [(draw(some(layouts)), draw(some([*ANY]))) for _ in range(count)],
        [draw(scale) for _ in range(count)],
        [draw(presence) for _ in range(count)],
        lrs, seed,
    )  # fmt: skip


def gradients(problem: Problem, both: Pair) -> list[Tensor | None]:
    """Towards a point, where the oracle is, so that no choice of hyper-parameters runs away."""
    draw = torch.Generator().manual_seed(1000 * problem.seed + both.k)
    sign = -1 if problem.options["maximize"] else 1
    noisy = [sign * size * (p - 2 + torch.randn(p.shape, generator=draw, dtype=p.dtype))
             for p, size in zip(both.theirs, problem.grad_scales, strict=True)]  # fmt: skip
    return [g if here[both.k] else None for g, here in zip(noisy, problem.presences, strict=True)]


def follow(problem: Problem, make: Any, oracle: Any, device: str, layouts: Any = None, **options: Any) -> None:
    groups = [{**group, "lr": lr} for group, lr in zip(problem.groups, problem.lrs[0], strict=True)]
    both = Pair(make, oracle, groups, torch.float64, device, layouts, **{**problem.options, **options})
    for lrs in problem.lrs:
        both.step(gradients(problem, both), *lrs)
        both.check(TOLERANCE)


# A fixture of this suite holds no state; pytest's others are not used.
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@fuzz
@given(data=st.data())
def test_any_step(backend, data):
    problem = data.draw(problems([*(DENSE if backend.dense_only else ANY)]))
    layouts = [(ANY[p], ANY[g]) for p, g in problem.layouts]
    follow(problem, backend, Algorithm4, backend.device, layouts)


@fuzz
@given(problem=problems(["contiguous"]))
def test_the_oracles_agree(problem):
    """Where prodigyopt can: it minimises, and gives the groups one lr."""
    problem.lrs = [[max(lrs) if lr else 0.0 for lr in lrs] for lrs in problem.lrs]
    problem.options["maximize"] = False
    ours = {key: v for key, v in problem.options.items() if key != "maximize"}
    problem.options = ours | {"maximize": False}

    def theirs(groups: list[dict[str, Any]], maximize: bool, **options: Any) -> Prodigyopt:
        return Prodigyopt(groups, **options)

    follow(problem, Algorithm4, theirs, "cpu")
