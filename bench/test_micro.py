"""The parts of a step, one by one: pytest bench/ --benchmark-only (not in the suite; see CONTRIBUTING.md)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prodigy_fused import Prodigy, backends, record
from prodigy_fused.estimate import FIELDS
from prodigy_fused.hyper import estimate_options_of, hyper_of
from prodigy_fused.plans import PlanSet
from prodigy_fused.sharding import Span
from prodigy_fused.step import Plan, Step

CHUNK = 1 << 15  # csrc/prodigy/chunk.h
MANY = [1000] * 1000
BACKENDS = ("cpu", "foreach")


def ready(sizes: list[int], backend: str = "cpu") -> Prodigy:
    """Returns an optimizer that has taken two steps and has gradients for the next."""
    p = torch.zeros(1)
    if reason := backends.get(backend).unsupported(p, Prodigy([p], fused=False).param_groups[0]):
        pytest.skip(reason)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n)) for n in sizes]
    optimizer = Prodigy(params, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def build(optimizer: Prodigy) -> PlanSet:
    """Returns new plans for the optimizer's tensors."""
    plans = PlanSet(optimizer.param_groups, optimizer.state, Span())
    plans.build()
    return plans


def parts(optimizer: Prodigy) -> tuple[Plan, Step]:
    """Returns the optimizer's one plan, its gradients loaded, and a step to take."""
    plans, groups = build(optimizer), optimizer.param_groups
    plans.load_gradients()
    (bucket,) = plans.plans
    plan = bucket.plan
    rows = torch.tensor([[float(groups[0][name]) for name in FIELDS]], dtype=torch.float64)
    step = Step([hyper_of(group) for group in groups], estimate_options_of(groups), rows, rows.clone())
    step.sums = plan.sums
    return plan, step


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan_building(benchmark, backend):
    benchmark(build, ready(MANY, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_looking_whether_all_tensors_are_still_the_same(benchmark, backend):
    optimizer = ready(MANY, backend)
    assert benchmark(build(optimizer).keep_up, optimizer.param_groups, optimizer.state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_address_refresh(benchmark, backend):
    optimizer = ready(MANY, backend)
    plan, _ = parts(optimizer)
    fresh = [[p.grad.clone() for p in optimizer.param_groups[0]["params"]] for _ in range(2)]

    def refresh():
        fresh.reverse()  # never the addresses of the last time
        plan.load_gradients(fresh[0])

    benchmark(refresh)


def test_packing_the_numbers_of_a_hundred_groups(benchmark):
    optimizer = Prodigy([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(100)])
    groups = optimizer.param_groups
    packed = benchmark(
        lambda: record.pack([hyper_of(g) for g in groups], estimate_options_of(groups), [0] * 100, 1.0, 0.0)
    )
    assert len(packed) == record.STEP.size + 100 * record.GROUP.size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[CHUNK], MANY], ids=["one chunk", "1,000 x 1,000"])
def test_update_and_sums(benchmark, backend, sizes):
    plan, step = parts(ready(sizes, backend))
    with torch.no_grad():
        benchmark(plan.update, step)
    assert plan.sums.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moved", [False, True], ids=["d stays", "d grows"])
def test_finish(benchmark, backend, moved):
    plan, step = parts(ready([CHUNK] * 32, backend))
    rows = step.rows.clone()
    with torch.no_grad():
        plan.update(step)
        step.sums = plan.sums.clone()
        step.sums[0, 0] = 1e9 * step.sums[0, 1] if moved else -1.0  # the numerator decides

        def finish():
            step.rows.copy_(rows)
            plan.finish(step, True)

        benchmark(finish)
    assert (step.new_rows[0, 0] != rows[0, 0]) == moved


def test_a_whole_step(benchmark):
    benchmark(ready(MANY).step)
