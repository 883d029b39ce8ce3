"""The parts of a step, one by one: pytest bench/ --benchmark-only (not in the suite; see CONTRIBUTING.md)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prodigy_fused import Prodigy, backends
from prodigy_fused.hyper import hyper_of, shared_of
from prodigy_fused.plans import Plans
from prodigy_fused.step import Step

CHUNK = 1 << 15  # csrc/prodigy/chunk.h
MANY = [1000] * 1000
BACKENDS = ("cpu", "foreach")


def ready(sizes: list[int], backend: str = "cpu") -> Prodigy:
    """An optimizer that has taken two steps and has gradients for the next."""
    p = torch.zeros(1)
    if reason := backends.load(backend).unsupported(p, Prodigy([p], fused=False).param_groups[0]):
        pytest.skip(reason)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n)) for n in sizes]
    optimizer = Prodigy(params, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def parts(optimizer: Prodigy) -> tuple[object, list, Step]:
    """The one plan, the gradients, and a step to take."""
    plans = optimizer._current_plans()
    ((plan, grads),) = plans.work(optimizer.param_groups)
    groups = optimizer.param_groups
    step = Step([hyper_of(group) for group in groups], shared_of(groups), optimizer._estimate.row.clone())
    step.sums = plan.sums
    return plan, grads, step


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan_building(benchmark, backend):
    optimizer = ready(MANY, backend)
    benchmark(Plans, optimizer.param_groups, optimizer.state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_looking_whether_all_tensors_are_still_the_same(benchmark, backend):
    optimizer = ready(MANY, backend)
    assert benchmark(optimizer._current_plans().fit, optimizer.param_groups, optimizer.state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_address_refresh(benchmark, backend):
    plan, grads, _ = parts(ready(MANY, backend))
    fresh = [[g.clone() for g in grads] for _ in range(2)]

    def refresh():
        fresh.reverse()  # never the addresses of the last time
        plan.check(fresh[0])

    benchmark(refresh)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[CHUNK], MANY], ids=["one chunk", "1,000 x 1,000"])
def test_update_and_sums(benchmark, backend, sizes):
    plan, grads, step = parts(ready(sizes, backend))
    with torch.no_grad():
        benchmark(plan.update, grads, step)
    assert plan.sums.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moved", [False, True], ids=["d stays", "d grows"])
def test_finish(benchmark, backend, moved):
    plan, grads, step = parts(ready([CHUNK] * 32, backend))
    row = step.row.clone()
    with torch.no_grad():
        plan.update(grads, step)
        step.sums = plan.sums.clone()
        step.sums[0] = 1e9 * step.sums[1] if moved else -1.0  # the numerator decides

        def finish():
            step.row.copy_(row)
            plan.finish(grads, step, True)

        benchmark(finish)
    assert (step.row[0] != row[0]) == moved


def test_a_whole_step(benchmark):
    benchmark(ready(MANY).step)
