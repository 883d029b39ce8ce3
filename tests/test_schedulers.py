"""Every scheduler of torch.optim drives the optimizer as it would drive the reference package's."""

import copy
import math
import warnings

import pytest
import torch
from toolbox import NHWC, agree, feed, make, parameters, train, twins
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

STEPS = 14
SCHEDULERS = {
    "LambdaLR": lambda opt: LambdaLR(opt, lambda t: 1 / (1 + t)),
    "LambdaLR-warm-up-from-0": lambda opt: LambdaLR(opt, lambda t: min(1.0, t / 4)),
    "LambdaLR-through-0": lambda opt: LambdaLR(opt, lambda t: float(t % 5 != 3)),
    "LambdaLR-to-0": lambda opt: LambdaLR(opt, lambda t: max(0.0, 1 - t / 8)),
    "MultiplicativeLR": lambda opt: MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: MultiStepLR(opt, [2, 5], 0.3),
    "ConstantLR": lambda opt: ConstantLR(opt, 0.3, 4),
    "LinearLR": lambda opt: LinearLR(opt, 0.1, 1.0, 6),
    "ExponentialLR": lambda opt: ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: PolynomialLR(opt, 10, 2.0),
    "CosineAnnealingLR": lambda opt: CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: CosineAnnealingWarmRestarts(opt, 4, 2),
    "SequentialLR": lambda opt: SequentialLR(opt, [LinearLR(opt, 0.1, 1.0, 4), StepLR(opt, 3)], [4]),
    "ChainedScheduler": lambda opt: ChainedScheduler([ConstantLR(opt, 0.1, 3), ExponentialLR(opt, 0.9)], opt),
    "CyclicLR": lambda opt: CyclicLR(opt, 0.1, 1.0, 3, cycle_momentum=False),
    "CyclicLR-momentum": lambda opt: CyclicLR(opt, 0.1, 1.0, 3, base_momentum=0.6, max_momentum=0.95),
    "OneCycleLR": lambda opt: OneCycleLR(opt, 2.0, total_steps=STEPS + 1, cycle_momentum=False),
    "OneCycleLR-momentum": lambda opt: OneCycleLR(opt, 2.0, total_steps=STEPS + 1, cycle_momentum=True),
    "ReduceLROnPlateau": lambda opt: ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "SWALR": lambda opt: SWALR(opt, 0.05, 5),
}
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def test_the_table_has_all_schedulers():
    tested = {name.partition("-")[0] for name in SCHEDULERS}
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= tested


def advance(scheduler):
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(1.0)  # a loss that never improves
    else:
        scheduler.step()


def follow(follower, leader):
    """The same lr and betas: what this test compares is what the optimizers make of them."""
    for mine, other in zip(follower.param_groups, leader.param_groups, strict=True):
        mine.update(lr=float(other["lr"]), betas=other["betas"])


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@each_scheduler
def test_scheduler(backend, name, tensor_lr):
    ours, theirs = twins(backend)
    if tensor_lr:
        ours = make(backend, lr=torch.tensor(1.0, dtype=torch.float64))
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns when the optimizer's step does not look like one
        warnings.filterwarnings("ignore", "The epoch parameter")  # torch 2.6, of what its own SequentialLR does
        scheduler = SCHEDULERS[name](ours)
        for t in range(STEPS):
            follow(theirs, ours)
            lr = ours.param_groups[0]["lr"]
            train(ours, theirs, steps=1, start=t)
            assert ours.param_groups[0]["lr"] is lr
            seen.add((float(ours.param_groups[0]["lr"]), *ours.param_groups[0]["betas"]))
            advance(scheduler)
    agree(ours, theirs)
    assert len(seen) > 1, "the schedule did nothing"


def test_lr_tensor_changed_in_place(backend):
    lr = torch.tensor(1.0, dtype=torch.float64)
    tensor, number = make(backend, lr=lr), make(backend, lr=1.0)
    for t in range(8):
        lr.fill_(1 / (1 + t))
        number.param_groups[0]["lr"] = 1 / (1 + t)
        train(tensor, number, steps=1, start=t)
    agree(tensor, number, rtol=0.0)


def test_momentum_switched_on_and_off(backend):
    opts = twins(backend, betas=(0.0, 0.99))
    for beta1 in (0.0, 0.9, 0.5, 0.0, 0.9):
        for opt in opts:
            opt.param_groups[0]["betas"] = (beta1, 0.99)
        if beta1 == 0.9:  # prodigyopt never makes up for an exp_avg that it did not start with
            for p in parameters(opts[1]):
                opts[1].state[p].setdefault("exp_avg", torch.zeros_like(p))
        train(*opts, steps=3, start=opts[0].step_count)
    agree(*opts)


def test_momentum_that_is_switched_off_stays_with_its_parameter(backend):
    """Also where the parameter changes in the meantime, and through a checkpoint."""
    opts = twins(backend)
    train(*opts, steps=3)
    for opt in opts:
        opt.param_groups[0]["betas"] = (0.0, 0.999)
    train(*opts, steps=2, start=3)
    p = parameters(opts[0])[NHWC]
    p.data = p.data.contiguous()
    train(*opts, steps=1, start=5)
    again = make(backend)
    again.load_state_dict(copy.deepcopy(opts[0].state_dict()))
    for p, q in zip(parameters(opts[0]), parameters(again), strict=True):
        q.data.copy_(p)
    for opt in (again, opts[1]):
        opt.param_groups[0]["betas"] = (0.9, 0.999)
    train(again, opts[1], steps=3, start=6)
    agree(again, opts[1])


def test_momentum_that_was_just_switched_on_is_saved(backend):
    opt, again = make(backend, betas=(0.0, 0.999)), make(backend)
    train(opt, steps=2)
    opt.param_groups[0]["betas"] = (0.9, 0.999)
    again.load_state_dict(opt.state_dict())
    for p, q in zip(parameters(opt), parameters(again), strict=True):
        q.data.copy_(p)
    train(opt, again, steps=2, start=2)
    assert all(map(torch.equal, parameters(opt), parameters(again)))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit", "min_8bit_size": 1}], ids=["float32", "8 bits"])
@pytest.mark.parametrize("compact", [False, True])
def test_momentum_of_a_parameter_that_joined_without_it_is_saved(options, compact):
    """The others have theirs from before it was switched off; prodigyopt expects one of every parameter."""
    opt, again = make("cpu", **options), make("cpu", **options)
    for t, beta1 in enumerate((0.9, 0.0)):
        opt.param_groups[0]["betas"] = (beta1, 0.999)
        feed(opt, t, without=(2,) if beta1 else ())
        opt.step()
    opt.param_groups[0]["betas"] = (0.9, 0.999)
    saved = opt.compact_state_dict() if compact else opt.state_dict()
    assert all("exp_avg" in state for state in saved["state"].values())
    again.load_state_dict(copy.deepcopy(saved))
    for p, q in zip(parameters(opt), parameters(again), strict=True):
        q.data.copy_(p)
    train(opt, again, steps=2, start=2)
    assert all(map(torch.equal, parameters(opt), parameters(again)))


def test_construction_with_lr_zero(backend):
    ours, theirs = twins(backend)
    ours = make(backend, lr=0.0, weight_decay=0.1)
    theirs.param_groups[0].update(weight_decay=0.1, lr=0.0)  # prodigyopt's constructor refuses it
    start = [p.detach().clone() for p in parameters(ours)]
    train(ours, theirs, steps=2)
    assert all(map(torch.equal, start, parameters(ours)))
    assert ours.step_count == 0
    for opt in (ours, theirs):
        opt.param_groups[0]["lr"] = 0.5
    train(ours, theirs, start=2)
    agree(ours, theirs)


def test_lr_ratio_between_groups_survives_a_schedule(backend):
    """LoRA+ and text encoders: the groups' own lr, times the schedule."""
    params = parameters(make(backend))
    opt = make(backend, [{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 0.25}])
    scheduler = LambdaLR(opt, [lambda t: 0.5**t, lambda t: 0.5**t])
    for t in range(6):
        train(opt, steps=1, start=t)
        scheduler.step()
        first, second = (group["lr"] for group in opt.param_groups)
        assert (first, second) == (0.5 ** (t + 1), 0.25 * 0.5 ** (t + 1))


@each_scheduler
def test_resumed_schedule(name):
    """Optimizer and scheduler saved together, mid-schedule, continue as if nothing had happened."""
    whole = make()
    schedule = SCHEDULERS[name](whole)
    for t in range(STEPS):
        if t == STEPS // 2:
            saved = copy.deepcopy((whole.state_dict(), schedule.state_dict(), parameters(whole)))
        train(whole, steps=1, start=t)
        advance(schedule)

    resumed = make(None, saved[2])
    schedule = SCHEDULERS[name](resumed)
    resumed.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    for t in range(STEPS // 2, STEPS):
        train(resumed, steps=1, start=t)
        advance(schedule)
    agree(resumed, whole, rtol=0.0)


def test_a_schedule_that_goes_wrong_is_refused_by_the_step(backend):
    opt = make(backend)
    scheduler = LambdaLR(opt, lambda t: math.nan if t == 3 else 1.0)
    for t in range(3):
        train(opt, steps=1, start=t)
        scheduler.step()
    before = [p.detach().clone() for p in parameters(opt)]
    feed(opt, 3)
    with pytest.raises(ValueError, match=r"\blr\b.*nan"):
        opt.step()
    assert all(map(torch.equal, before, parameters(opt)))
    assert opt.d == float(opt.param_groups[0]["d"])
