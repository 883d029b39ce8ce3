"""What foreach asks of a device: as many operations for many tensors as for a few, and nothing read back."""

import gc
import math
import weakref

import pytest
import torch
from toolbox import wants_grad_dtype
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prodigy_fused import Prodigy, plans
from prodigy_fused.backends import foreach
from prodigy_fused.backends.foreach import ForeachPlan
from prodigy_fused.dtensor import IndexMap
from prodigy_fused.step import Step
from prodigy_fused.sums import sums_of_any_order

READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default"}
VIEWS = {
    "aten.view",
    "aten.narrow",
    "aten.slice",
    "aten.split",
    "aten.split_with_sizes",
    "aten.as_strided",
    "aten.expand",
}


class Operations(TorchDispatchMode):
    """Lists what is dispatched, without views, for which a device does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).rpartition(".")[0] not in VIEWS:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ForeachPlan, "on_host", lambda self, step: False)


def optimizer(tensors, dtype, **options):
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(3 + i % 7, 50, generator=draw).to(dtype)) for i in range(tensors)]
    return Prodigy(params, backend="foreach", d0=1e-3, **options), draw


def step(opt, draw):
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
    opt.step()


def operations(tensors, dtype, **options):
    opt, draw = optimizer(tensors, dtype, **options)
    step(opt, draw)
    step(opt, draw)
    with Operations() as seen, torch.no_grad():
        plan = opt._runtime.plans.plans[0][0]
        # Not the optimizer's step, which on a CPU reads the estimate to publish it.
        opt._runtime.plans.load_gradients()
        scalars = last_step(opt)
        seen.names.clear()
        plan.update(scalars)
        scalars.sums = plan.sums
        plan.finish(scalars, last=True)
    return seen.names


def last_step(opt):
    """The scalars that a step has now."""
    settings = opt._runtime._settings
    settings.read(opt.param_groups)
    rows = opt._runtime._estimates.rows
    return Step(settings.hypers, settings.estimates, rows, torch.empty_like(rows))


EIGHT = {"state_dtype": "8bit", "min_8bit_size": 1}
CASES = [
    {},
    {"slice_p": 11},
    {"betas": (0.0, 0.99), "weight_decay": 0.1},
    {"weight_decay": 0.1, "decouple": False, "maximize": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        (torch.float32, {}),
        (torch.float32, EIGHT),
        (torch.bfloat16, {}),
        (torch.bfloat16, EIGHT),
        (torch.bfloat16, {"state_dtype": torch.bfloat16}),
        (torch.bfloat16, {"low_precision": "displacement"}),
        (torch.bfloat16, {"low_precision": "24bit"}),
    ],
    ids=str,
)
def test_operations_do_not_grow_with_the_tensors(as_on_a_gpu, dtype, more, options):
    if more.get("low_precision") == "displacement" and "slice_p" in options:
        pytest.skip("refused")
    few, many = (operations(n, dtype, **more, **options) for n in (10, 100))
    # Samples are not side by side: those of x, of its further 8 bits, of the gradient and of the random bits are copied
    # tensor by tensor.
    of_each = 2 + (dtype == torch.bfloat16) + (more.get("state_dtype") == torch.bfloat16) if "slice_p" in options else 0
    assert len(many) == len(few) + 90 * of_each
    assert not READS & set(many)


def lower_half(p):
    """The index map of a shard: the lower half of the rows."""
    rows = torch.arange(len(p), 2 * len(p))
    return IndexMap((2 * len(p), p.shape[1]), [rows, None])


def test_operations_do_not_grow_with_the_shards(as_on_a_gpu, monkeypatch):
    """Those whose first elements are alike modulo 8 are stepped together: here, that is 0, 2, 4 or 6."""
    ordinary = operations(100, torch.bfloat16)
    monkeypatch.setattr(plans, "is_dtensor", lambda p: True)
    monkeypatch.setattr(plans, "index_map", lower_half)
    few, many = (operations(n, torch.bfloat16) for n in (20, 100))
    assert len(few) == len(many) <= 4 * len(ordinary)
    assert not READS & set(many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_codes_of_many_tensors_at_once_are_those_of_each(monkeypatch, dtype, options):
    """Short blocks at their ends, other orders of memory, gaps, none."""
    runs = []
    for large in (1, 1 << 16):
        monkeypatch.setattr(foreach, "LARGE", large)
        draw = torch.Generator().manual_seed(0)
        values = [
            torch.randn(shape, generator=draw).to(dtype) for shape in ((293,), (2, 3, 40, 50), (0,), (), (9, 300))
        ]
        values[1] = values[1].to(memory_format=torch.channels_last)
        values.append(torch.randn(30, 80, generator=draw).to(dtype)[:, ::2])
        params = list(map(nn.Parameter, values))
        opt = Prodigy(params, backend="foreach", d0=1e-3, **EIGHT, **options)
        for _ in range(4):
            for p in params:
                p.grad = (p.detach() + torch.randn(p.shape, generator=draw)).to(p.dtype)
            opt.step()
        tensors = [t for p in params for t in (p.detach(), *opt.state[p].values()) if isinstance(t, torch.Tensor)]
        runs.append((opt.d, tensors))
    (d_alone, alone), (d, together) = runs
    assert d == d_alone > 1e-3 or options.get("maximize")
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [*CASES, {"slice_p": 3, "weight_decay": 0.1}], ids=str)
def test_both_ways_to_compute_agree(monkeypatch, dtype, options):
    """As on a GPU, and as on a CPU; with zero, infinite and missing gradients."""
    runs = []
    for on_host in (True, False):
        with monkeypatch.context() as patched:
            if not on_host:
                patched.setattr(ForeachPlan, "on_host", lambda self, step: False)
            opt, draw = optimizer(9, dtype, low_precision="nearest", **options)
            for t in range(8):
                if t == 3:
                    opt.param_groups[0]["params"][2].grad = None
                for i, p in enumerate(opt.param_groups[0]["params"]):
                    p.grad = (p.detach() + 0.1 * torch.randn(p.shape, generator=draw)).to(p.dtype)
                    if t == 0:
                        p.grad.zero_()
                    if (t, i) == (5, 4):
                        p.grad[1, 5] = torch.inf
                opt.step()
            runs.append(opt)
    ours, theirs = runs
    assert ours.nonfinite_steps == theirs.nonfinite_steps
    tight = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    assert ours.d == pytest.approx(theirs.d, rel=tight)
    assert ours.d > 1e-3 or options.get("maximize")
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in runs), strict=True):
        # Without momentum an element whose v is small magnifies what the order of two roundings changes.
        assert p.isclose(q, rtol=tight, atol=tight).double().mean() > 0.99


def compared(params, grads, **options):
    """The sums of parameters, and d, after steps on the gradients that ``grads`` returns: foreach's and reference's."""
    runs = []
    for backend in ("foreach", "reference"):
        own = params()
        opt = Prodigy(own, backend=backend, **options)
        for t in range(4):
            for p, g in zip(own, grads(own, t), strict=True):
                p.grad_dtype = None  # any
                p.grad = g
            opt.step()
        runs.append([opt.d, *(p.detach().double().sum().item() for p in own)])
    return runs


@wants_grad_dtype
def test_gradients_of_two_dtypes():
    """With d = 1, nothing else would convert them."""

    def params():
        return [nn.Parameter(torch.linspace(-1, 1, 9000).bfloat16()) for _ in range(3)]

    def grads(own, t):
        return [p.detach().to(torch.float32 if i == 0 else p.dtype) + t for i, p in enumerate(own)]

    ours, theirs = compared(params, grads, d0=1.0, lr=1e-3)
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_that_share_memory_are_stepped_one_after_the_other(dtype):
    def params():
        memory = torch.ones(10, dtype=dtype)
        return [nn.Parameter(memory), nn.Parameter(memory)]

    def grads(own, t):
        return [p.detach().clone() for p in own]

    ours, theirs = compared(params, grads, d0=0.1)
    assert ours == pytest.approx(theirs, rel=1e-5) and abs(ours[1] - 10) > 1


@pytest.mark.parametrize("d", [1e17, 1e20, 1e38, 1e45])
@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.99)}, {"weight_decay": 0.1}], ids=str)
def test_numbers_that_float32_cannot_hold_are_infinite(d, options):
    """As arguments of an operation they raise, in the middle of a step."""
    runs = []
    for backend in ("foreach", "reference"):
        draw = torch.Generator().manual_seed(0)
        opt = Prodigy([nn.Parameter(torch.randn(5, generator=draw)) for _ in range(2)], backend=backend, **options)
        (group,) = opt.param_groups
        for t in range(2):
            for p in group["params"]:
                p.grad = torch.randn(5, generator=draw) * torch.tensor([0.0, 1e-3, 1.0, 1.0, 1.0])
            if t == 1:
                group["d"] = group["d_max"] = d
            opt.step()
        tensors = {key: t for p in group["params"] for key, t in {"x": p, **opt.state[p]}.items() if key != "step"}
        runs.append(({key: group[key] for key in ("d", "k", "nonfinite_steps")}, tensors))
    (ours, tensors), (theirs, expected) = runs
    assert ours == theirs and theirs["d"] == d
    for key, t in tensors.items():
        torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_runs_that_hold_copies_of_gradients_are_not_kept_until_the_second_phase(order, copied):
    """They would need as much memory as all gradients."""
    other = torch.contiguous_format if order == torch.channels_last else torch.channels_last
    params = [nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=order)) for _ in range(3)]
    opt = Prodigy(params, backend="foreach")

    def feed():
        for p in params:
            p.grad = torch.ones(2, 3, 4, 5).to(memory_format=other if copied else order)

    for _ in range(2):
        feed()
        opt.step()
    plan = opt._runtime.plans.plans[0].plan
    assert plan._runs is None  # nor from step to step
    feed()
    opt._runtime.plans.load_gradients()
    plan.update(last_step(opt))
    assert (plan._runs is None) == copied


def test_state_that_is_replaced_is_not_kept():
    """As by offloading, which does so for the memory; tensors of the same layout need no new plan."""
    opt, draw = optimizer(3, torch.float32)
    step(opt, draw)
    before = opt._runtime.plans.plans[0].plan
    old = [weakref.ref(state["exp_avg"]) for state in opt.state.values()]
    for state in opt.state.values():
        state["exp_avg"] = state["exp_avg"].clone()
    gc.collect()
    assert [r() for r in old] == [None] * 3
    step(opt, draw)
    assert opt._runtime.plans.plans[0].plan is before
    opt.state[opt.param_groups[0]["params"][0]]["exp_avg"] = torch.zeros(50, 3).T
    step(opt, draw)
    assert opt._runtime.plans.plans[0].plan is not before


def test_a_sum_that_does_not_depend_on_the_order():
    draw = torch.Generator().manual_seed(0)
    terms = torch.randn(30_000, generator=draw, dtype=torch.float64)
    terms *= 10.0 ** torch.randint(-9, 9, terms.shape, generator=draw)
    exact = math.fsum(terms.tolist())
    for scale in (1.0, 2.0**-800, 2.0**900):
        orders = [terms * scale, (terms * scale).flip(0), terms[torch.randperm(len(terms), generator=draw)] * scale]
        sums = {sums_of_any_order(torch.stack([order, -order])) for order in orders}
        found = torch.stack([*sums]) / scale
        assert torch.equal(found, found[:1].expand(3, 2)) and found[0, 0] == -found[0, 1]
        assert found[0, 0] == pytest.approx(exact, rel=1e-9)
    others = torch.tensor([[0.0, 0.0], [1.0, math.nan], [1.0, math.inf]]).double()
    assert torch.equal(
        sums_of_any_order(others).nan_to_num(7.0), torch.tensor([0.0, 7.0, math.inf]).double().nan_to_num()
    )
