"""prodigy_fused.convex: the numbers of every method. Input and checkpoints are in test_convex_input.py, the theory in
test_convex_theory.py."""

import numpy as np
import pytest
import torch
from convex_oracle import (
    ALL,
    DISTANCE,
    METHODS,
    TOLD,
    Oracle,
    advance,
    everything,
    feed,
    joined,
    make,
    normal,
    options_of,
    problems,
    same,
    split,
    start,
    step,
)  # fmt: skip
from oracle import numpy
from toolbox import parameters, refused
from torch import nn

from prodigy_fused import convex

LAD, POLYHEDRAL = problems()[2], problems()[5]
X, Y = normal(5, 30, 3), torch.arange(30) % 3
MARGIN = lambda x: nn.functional.multi_margin_loss(X @ x.view(3, 3), Y)  # noqa: E731
# f, d0, G, f*, and which weights
RUNS = {
    "lad": (LAD.f, 1e-2, 0.0, 0.0, None),
    "margin": (MARGIN, 1e-4, 1.5, 0.1, lambda k: 1 + k**0.5),
    "polyhedral": (POLYHEDRAL.f, 0.3, 0.2, 0.0, lambda k: 0.9**k),
}


def close(got, wanted, start, tolerance=1e-9):
    """Whether a point agrees, measured by its distance from the start."""
    scale = np.abs(wanted - start).max() + 1e-7 * np.abs(start).max()
    return np.abs(got - wanted).max() <= tolerance * scale


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_brute_force(method, run):
    """x, d, d_hat and the average after each of 70 steps, with the parameters in three tensors."""
    f, d0, G, f_star, weights = RUNS[run]
    options = options_of(method, d0, G, D=d0, f_star=f_star)
    if method == "ProdigyGD" and weights:
        options["weights"] = weights
    if method == "DAdaptReset" and run == "margin":
        options["threshold"] = 1.4
    params = split(normal(3, 9))
    opt = make(method, params, **options)
    assert opt.d == pytest.approx(0 if method == "Polyak" else d0 * (3**0.5 if method == "LDoG" else 1), rel=1e-15)
    start, reach = joined(params).detach().numpy().astype(np.longdouble), [6, 8, 9]
    blocks = [slice(a, b) for a, b in zip([0, *reach], reach, strict=False)] if method == "LDoG" else [slice(None)]
    settings = {"d0": 0 if method == "Polyak" else d0, **options}
    oracles = [Oracle(method, start[block], **{k: v for k, v in settings.items() if k != "D"}) for block in blocks]
    for _ in range(70):
        loss = advance(opt, params, f)
        for oracle, block in zip(oracles, blocks, strict=True):
            oracle.step(joined(p.grad for p in params).numpy()[block], loss)
        assert close(numpy(joined(params)), np.concatenate([o.x[-1] for o in oracles]), start)
        assert close(numpy(joined(opt.average())), np.concatenate([o.average for o in oracles]), start)
        d, d_hat = [o.d[-1] for o in oracles], [o.d_hat[-1] for o in oracles]
        assert opt.d == pytest.approx(float(np.linalg.norm(d)), rel=1e-9)
        assert opt.d_hat == pytest.approx(float(np.linalg.norm(d_hat) if method == "LDoG" else d_hat[0]), rel=1e-9)
    assert method in (*TOLD, "Polyak") or opt.d > 1.5 * d0
    assert opt.step_count == 70


# -- what is a parameter, and a gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in ALL if m != "LDoG"])
def test_groups_share_one_estimate_and_no_gradient_is_a_zero_one(method):
    """The same numbers with one tensor, three, or groups of them; with None, or zeros."""
    one, three = start(method, [nn.Parameter(normal(3, 9))]), start(method)
    first, *rest = split(normal(3, 9))
    grouped = start(method, [{"params": [first]}, {"params": rest}])
    for k in range(12):
        without = (1,) if k > 3 or method == "DAdaptAdam" else ()  # Adam leaves it alone, here for ever
        step(three, k, without)
        step(grouped, k, without)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters(three)]
        parameters(one)[0].grad = joined(grads)
        one.step(lambda k=k: 1.0 + k)
        assert numpy(everything(three)) == pytest.approx(numpy(everything(one)), rel=1e-12)
        assert numpy(everything(three)) == pytest.approx(numpy(everything(grouped)), rel=1e-12)


@pytest.mark.parametrize("method", ALL)
def test_without_any_gradient_there_is_no_step(method):
    opt = start(method)
    for _ in range(2):
        assert opt.step(lambda: 7.0) == 7.0
        assert (opt.step_count, opt.param_groups[0]["estimates"], len(opt.state)) == (0, [], 0)
    before = joined(parameters(opt)).clone()
    for p in parameters(opt):
        p.grad = torch.zeros_like(p)
    opt.step(lambda: 7.0)  # at a minimum nothing moves
    assert torch.equal(joined(parameters(opt)), before)
    if hasattr(opt, "average"):
        assert torch.equal(joined(opt.average()), before)
    step(opt, 0)
    assert not torch.equal(joined(parameters(opt)), before)
    assert torch.isfinite(joined(parameters(opt))).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_joins_later(method):
    """As one that was there, and had no gradient."""
    late, early = start(method), start(method)
    params = [nn.Parameter(normal(6, 4)) for _ in range(2)]
    early.add_param_group({"params": params[0]})
    for k in range(8):
        if k == 4:
            late.add_param_group({"params": (p for p in [params[1]])})
            assert late.param_groups[1]["estimates"] == late.param_groups[0]["estimates"] != []
        step(early, k, without=(3,) if k < 4 else ())
        step(late, k)
    assert late.step_count == 8
    if method == "LDoG":  # whose average had weight before
        assert torch.equal(joined(parameters(late)), joined(parameters(early)))
    else:
        assert same(late, early)
    assert not torch.equal(params[0], normal(6, 4))


@pytest.mark.parametrize("method", DISTANCE)
def test_the_first_distance_is_relative(method):
    """1e-6 (1 + |x0|), of all or of each parameter; x0 is where the first step finds the parameters."""
    params = split(normal(4, 9))
    opt = make(method, params)
    with torch.no_grad():
        for p in params:
            p.mul_(3)
    blocks = params if method == "LDoG" else [joined(params)]
    wanted = [1e-6 * (1 + float(block.detach().norm())) for block in blocks]
    assert opt.d == pytest.approx(np.linalg.norm(wanted), rel=1e-12)
    before = joined(params).detach().clone()
    step(opt, 0)
    assert float((joined(params) - before).detach().norm()) == pytest.approx(np.linalg.norm(wanted), rel=1e-9)


def test_polyak_does_not_climb():
    """Below a minimum that was too high, it stays."""
    opt = start("Polyak", f_star=2.0)
    feed(opt, 0)
    opt.step(lambda: 1.0)
    assert torch.equal(joined(parameters(opt)), normal(3, 9))
    opt.step(lambda: 3.0)
    assert not torch.equal(joined(parameters(opt)), normal(3, 9))


def test_a_change_from_outside_is_kept():
    opt, twin = start("ProdigyGD"), start("ProdigyGD")
    for k in range(6):
        step(opt, k)
        step(twin, k)
    with torch.no_grad():
        parameters(opt)[0].add_(0.5)
    moved = opt.state[parameters(opt)[0]]["z"].clone()
    step(opt, 6)
    step(twin, 6)
    assert torch.allclose(parameters(opt)[0] - parameters(twin)[0], torch.tensor(0.5).double(), atol=0.2)
    assert not torch.allclose(opt.state[parameters(opt)[0]]["z"], moved, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_first_estimate_grows_in_low_precision(dtype):
    """Where no parameter shows the first steps: without the displacement ``d`` would stay at ``d0``."""
    p, exact = (nn.Parameter(torch.ones(30_000, dtype=each)) for each in (dtype, torch.float64))
    opt, twin = convex.ProdigyGD([p]), convex.ProdigyGD([exact])
    for x in (p, exact):
        x.grad = torch.full_like(x, -1.0)
    for k in range(80):
        opt.step()
        twin.step()
        assert k >= 10 or bool((p == 1).all())
        assert opt.d == pytest.approx(twin.d, rel=1e-12)
    assert twin.d > 10 and torch.equal(p, exact.to(dtype))
    assert p.dtype == opt.average()[0].dtype == dtype
    assert opt.state[p]["z"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_only_the_parameters_are_rounded(method, dtype):
    """On the same gradients, all else is as with parameters of float64."""
    low = [nn.Parameter(p.detach().to(dtype)) for p in split(normal(3, 9))]
    opt, twin = start(method, low), start(method, [nn.Parameter(p.detach().double()) for p in low])
    for k in range(6):
        step(opt, k)
        for p, q in zip(low, parameters(twin), strict=True):
            q.grad = p.grad.double()
        twin.step(lambda k=k: 1.0 + k)
        assert [opt.d, opt.d_hat] == [twin.d, twin.d_hat]
        rounded = [q.to(dtype) for q in (*parameters(twin), *twin.average())]
        assert torch.equal(joined([*low, *opt.average()]), joined(rounded))


@pytest.mark.parametrize("method", ["ProdigyGD", "ProdigyDA", "ProdigyCoordinate"])
def test_the_certificate_does_not_cancel(method):
    """x0 - x of 1e-10, of which the parameters near 1 keep six digits: in the linear phase d_hat is the average's
    distance."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = make(method, [p], d0=1e-10)
    for _ in range(15):
        p.grad = -torch.ones_like(p)
        opt.step()
        size = opt.state[p]["mean"].abs().max() if method == "ProdigyCoordinate" else opt.state[p]["mean"].norm()
        assert float(size) == pytest.approx(opt.d_hat, rel=1e-12)


# -- D-Adaptation's Adam -----------------------------------------------------------------------------------------------


class Adam:
    """One number's history, as dadaptation 3.2 computes it."""

    def __init__(self, x, d0, beta1, beta2, eps, decay, decouple, correct, growth):
        self.x, self.d, self.s, self.m, self.v, self.r, self.k = x, d0, 0 * x, 0 * x, 0 * x, 0.0, 0
        self.beta1, self.beta2, self.eps, self.decay, self.growth = beta1, beta2, eps, decay, growth
        self.decouple, self.correct = decouple, correct

    def step(self, g, lr):
        root = np.sqrt(self.beta2)
        bc = np.sqrt(1 - self.beta2 ** (self.k + 1)) / (1 - self.beta1 ** (self.k + 1)) if self.correct else 1
        dlr = self.d * lr * bc
        g = g if self.decouple else g + self.decay * self.x
        self.r = root * self.r + (1 - root) * dlr * (g @ (self.s / (np.sqrt(self.v) + self.eps)))
        self.m = self.beta1 * self.m + (1 - self.beta1) * dlr * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        self.s = root * self.s + (1 - root) * dlr * g
        self.d_hat = self.r / ((1 - root) * np.abs(self.s).sum())
        self.d = max(self.d, min(self.d_hat, self.growth * self.d))
        if self.decouple:
            self.x = self.x - self.decay * dlr * self.x
        self.x = self.x - self.m / (np.sqrt(self.v) + self.eps)
        self.k += 1


@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize(("correct", "growth"), [(False, float("inf")), (True, 1.3)])
def test_adam_agrees_with_its_formulas(decouple, correct, growth):
    params = split(normal(3, 9))
    numbers = {"d0": 1e-3, "eps": 1e-6, "weight_decay": 0.1, "growth_rate": growth}
    opt = convex.DAdaptAdam(params, betas=(0.8, 0.9), decouple=decouple, use_bias_correction=correct, **numbers)
    oracle = Adam(joined(params).detach().numpy(), 1e-3, 0.8, 0.9, 1e-6, 0.1, decouple, correct, growth)
    for k in range(60):
        opt.param_groups[0]["lr"] = lr = 1 - k / 100
        feed(opt, k)
        grads = [p.grad.clone() for p in params]
        oracle.step(joined(grads).numpy(), lr)
        opt.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        assert close(numpy(joined(params)), oracle.x, numpy(normal(3, 9)), 1e-10)
        assert [opt.d, opt.d_hat] == pytest.approx([oracle.d, oracle.d_hat], rel=1e-10)
    assert opt.d > 2e-3


def test_adam_of_16_bits_has_a_state_of_32():
    low = [nn.Parameter(p.detach().bfloat16()) for p in split(normal(3, 9))]
    opt, twin = start("DAdaptAdam", low), start("DAdaptAdam", [nn.Parameter(p.detach().float()) for p in low])
    feed(opt, 0)
    for p, q in zip(low, parameters(twin), strict=True):
        q.grad = p.grad.float()
    opt.step()
    twin.step()
    assert opt.d_hat == twin.d_hat
    for p, q in zip(low, parameters(twin), strict=True):
        assert torch.equal(p, q.bfloat16())
        assert all(torch.equal(opt.state[p][name], vector) for name, vector in twin.state[q].items())


def test_adam_leaves_a_group_without_lr_alone():
    a, b, c = split(normal(3, 9))
    opt = convex.DAdaptAdam([{"params": [a, b]}, {"params": [c], "lr": 0.0, "weight_decay": 0.5}], d0=1e-2)
    alone = start("DAdaptAdam", split(normal(3, 9))[:2])
    for k in range(6):
        feed(opt, k)
        opt.step()
        feed(alone, k)
        alone.step()
    assert torch.equal(joined([a, b]), joined(parameters(alone)))
    assert torch.equal(c, split(normal(3, 9))[2]) and c not in opt.state
    opt.param_groups[1]["lr"] = 0.5
    with refused(opt, ValueError, "Invalid lr"):
        opt.step()
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert opt.step_count == 6
