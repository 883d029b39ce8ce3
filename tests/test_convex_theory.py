"""The theory of the methods of prodigy_fused.convex, on problems whose solution is known.

The bounds are those of the papers, with their constants derived here for one run: ``d``, ``d_hat`` and the weights of
the average are the run's own, so the inequality must hold after every step. ``w_k`` are those weights, ``r`` is
``|x_{k+1} - x0|``, and everything starts from ``sum w_k (f(x_k) - f*) <= sum w_k <g_k, x_k - x*>``.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from convex_oracle import ESTIMATING, METHODS, TOLD, make, options_of, problems
from torch import nn

PROBLEMS = {problem.name: problem for problem in problems()}
STEPS = 120


class Run:
    """A method on a problem: arrays of what was after each of n steps, as ``after 1 step`` first."""

    def __init__(self, method, problem, steps=STEPS, d0=None, c=1.0, **options):
        self.problem, self.d0 = problem, problem.D * 1e-2 if d0 is None else d0
        D = problem.D
        G = (problem.G_inf if method == "ProdigyCoordinate" else problem.G) * c
        settings = options_of(method, self.d0, G, D, c * problem.least)
        x = nn.Parameter(problem.x0.clone())
        self.opt = make(method, [x], **{**settings, **options})
        self.G, self.d, rows, self.averages = settings.get("G", problem.G), [self.opt.d], [], []
        for _ in range(steps):
            at = x.detach().clone()
            g = x.grad = c * problem.g(at)
            f = float(self.opt.step(lambda at=at: c * problem.f(at)))
            average = self.opt.average()[0]
            self.averages.append(average)
            self.d.append(self.opt.d)
            gap = float(problem.f(average)) - problem.least
            away = float((at - problem.solution).norm())
            rows.append((f, float(g @ g), gap, self.opt.d_hat, away, float(g.abs().max())))
        self.f, self.gg, self.gap, self.d_hat, self.away, self.g_inf = np.array(rows).T
        self.x, self.d, self.k = x.detach(), np.array(self.d), np.arange(steps)

    @property
    def old(self):
        """The d with which each step was taken; ``new`` is that after it."""
        return self.d[:-1]

    @property
    def new(self):
        return self.d[1:]


run = cache(lambda method, name: Run(method, PROBLEMS[name]))
weights = lambda k: (1.0 + k) ** 0.5  # noqa: E731
each_method = pytest.mark.parametrize("method", METHODS)
each_problem = pytest.mark.parametrize("name", PROBLEMS)


# -- the rates ---------------------------------------------------------------------------------------------------------


def descent(t, lam=1.0, weighted=True):
    """gap <= D r / sum eta, and r <= 2 d_{k+1} + sqrt(sum eta^2 |g|^2), because sum eta <g, x0 - x> is both
    r d_hat and (r^2 - sum eta^2 |g|^2) / 2; the sum under the root is at most d^2 log(1 + S / (d0^2 G^2))."""
    a = t.old * lam if weighted else np.ones_like(t.old)
    first = t.d0 if weighted else 1.0
    r = t.new * (2 + np.sqrt(np.log(1 + np.cumsum(a**2 * t.gg) / (first * t.G) ** 2)))
    below = np.sqrt((t.old if weighted else 1) ** 2 + np.cumsum(a**2))
    eta = (t.old**2 * lam if weighted else t.old) / (t.G * below)
    return t.problem.D * r / np.cumsum(eta)


def averaging(t, D, size=1.0, weighted=True):
    """gap <= D |s| / sum w, and gamma |s|^2 <= 2 d |s| + 2 d^2 / gamma, so |s| <= (1 + sqrt 3) d / gamma. With a step
    size per coordinate the same for the 1-norm, and the sum of all 1 / gamma."""
    w = t.old**2 if weighted else t.old
    root = np.sqrt(t.new**2 + np.cumsum(w)) if weighted else np.sqrt(t.k + 2)
    return D * (1 + math.sqrt(3)) * t.new * size * t.G * root / np.cumsum(w)


def resetting(t):
    """An epoch of m steps: sum d_r (f - f*) <= |s| D, |s| <= (5 + sqrt 2) d_r G sqrt(m + 1). Cauchy and Schwarz over
    the epochs, of which there are at most log2(D / d0) + 1."""
    epochs = 1 + max(0.0, math.log2(t.problem.D / t.d0))
    return (5 + math.sqrt(2)) * t.G * t.problem.D * np.sqrt(epochs * (t.k + 1 + epochs)) / (t.k + 1)


def over_gradients(t, power):
    """DoG's lemma, and DoWG's: sum w <g, x - x*> <= d (2 max |x_i - x*| + d) sqrt(sum w / d |g|^2 ...)."""
    squares = np.sqrt(np.cumsum(t.old ** (2 * power - 2) * t.gg))
    reach = np.maximum.accumulate(np.append(t.away, 0)[:-1])
    return t.old * (2 * reach + t.old) * squares / np.cumsum(t.old**power)


BOUNDS = {
    "ProdigyGD": descent,
    "ProdigyDA": lambda t: averaging(t, t.problem.D),
    "ProdigyCoordinate": lambda t: averaging(t, t.problem.D_inf, t.problem.x0.numel()),
    "DAdaptReset": resetting,
    "DAdaptGD": lambda t: descent(t, weighted=False),
    "DAdaptDA": lambda t: averaging(t, t.problem.D, weighted=False),
    "DoG": lambda t: over_gradients(t, 1),
    "DoWG": lambda t: over_gradients(t, 2),
    # sum eta (f - f*) <= (D^2 + sum eta^2 |g|^2) / 2
    "AdagradNorm": lambda t: t.problem.D * (2 + np.log(np.cumsum(t.gg) / t.gg[0])) * t.G / (2 * np.sqrt(t.k + 1)),
    "NormalizedSubgradient": lambda t: (
        t.problem.D * t.G * (1 + np.cumsum(1 / (t.k + 1))) / (2 * np.cumsum((t.k + 1) ** -0.5))
    ),
    # sum (f - f*)^2 <= G^2 D^2
    "Polyak": lambda t: t.problem.D * t.G / np.sqrt(t.k + 1),
}


@each_problem
@pytest.mark.parametrize("method", BOUNDS)
def test_the_gap_is_bounded_after_every_step(method, name):
    t = run(method, name)
    assert (t.gg <= t.problem.G**2 * (1 + 1e-12)).all() and (t.g_inf <= t.problem.G_inf * (1 + 1e-12)).all()
    assert (t.gap <= BOUNDS[method](t) * (1 + 1e-9)).all()


@each_problem
def test_the_bound_with_increasing_weights(name):
    t = Run("ProdigyGD", PROBLEMS[name], weights=weights)
    assert (t.gap <= descent(t, weights(t.k)) * (1 + 1e-9)).all()


@each_problem
@pytest.mark.parametrize("method", ["ProdigyGD", "ProdigyDA", "ProdigyCoordinate"])
def test_the_rate_of_the_theorem(method, name):
    """After the best of n steps, sqrt(log2(D / d0) / n): the lemma says that d_{k+1}^2 cannot always be much larger
    than the average of d_i^2."""
    t = run(method, name)
    ratios = t.new**2 / np.cumsum(t.old**2)
    log = 1 + 2 * np.log2(t.new / t.d0)
    assert (np.minimum.accumulate(ratios) <= 4 * log / (t.k + 1)).all()
    best = np.array([np.argmin(ratios[: n + 1]) for n in t.k])
    distance, size = (t.problem.D_inf, t.problem.x0.numel()) if method == "ProdigyCoordinate" else (t.problem.D, 1)
    L = np.log(1 + np.cumsum(t.old**2 * t.gg) / (t.d0 * t.G) ** 2)
    factor = (
        math.sqrt(2) * (2 + np.sqrt(L)) if method == "ProdigyGD" else (1 + math.sqrt(3)) * np.sqrt(1 + ratios)[best]
    )
    assert (t.gap[best] <= factor * size * t.G * distance * 2 * np.sqrt(log / (t.k + 1))).all()


# -- the estimate ------------------------------------------------------------------------------------------------------


@each_problem
@each_method
def test_the_estimate_is_at_most_the_distance_and_never_falls(method, name):
    t = run(method, name)
    assert (np.diff(t.d) >= 0).all()
    if method in ESTIMATING:
        D = t.problem.D_inf if method == "ProdigyCoordinate" else t.problem.D
        assert (t.d_hat <= D * (1 + 1e-9)).all()
        slow = method.startswith("DAdapt")  # at D / d0 = 1e4
        assert t.d[-1] > 0.001 * D or slow


# -- scaling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lad", "linf"])
@each_method
def test_a_scaled_objective_changes_no_iterate(method, name):
    """f to c f, and G to c G: the same x, d and average."""
    c = 2.0**-40 if method == "ProdigyGD" else 777.0
    plain, scaled = (Run(method, PROBLEMS[name], 60, c=each) for each in (1.0, c))
    assert scaled.d == pytest.approx(plain.d, rel=1e-6)
    assert scaled.x.numpy() == pytest.approx(plain.x.numpy(), rel=1e-6)
    assert scaled.averages[-1].numpy() == pytest.approx(plain.averages[-1].numpy(), rel=1e-6)


@each_method
def test_a_scaled_space_scales_the_iterates(method):
    """f(x) to f(x / c), x0 and d0 (or D) to c x0 and c d0: c times the iterates, and the gradients are c times less."""
    problem, c = PROBLEMS["lad"], 1e6
    plain, scaled = (nn.Parameter(scale * problem.x0) for scale in (1.0, c))
    a = make(method, [plain], **options_of(method, 1e-3, problem.G))
    b = make(method, [scaled], **options_of(method, c * 1e-3, problem.G / c, c))
    for _ in range(60):
        plain.grad, scaled.grad = problem.g(plain.detach()), problem.g(scaled.detach() / c) / c
        a.step(lambda: problem.f(plain.detach()))
        b.step(lambda: problem.f(scaled.detach() / c))
    assert c * a.d == pytest.approx(b.d, rel=1e-6)
    for x, y in ((plain, scaled), (a.average()[0], b.average()[0])):
        assert (c * x).detach().numpy() == pytest.approx(y.detach().numpy(), rel=1e-6)


# -- what is seen ------------------------------------------------------------------------------------------------------

# The average's gap on LAD after 120 steps, as a part of the first gap, from d0 = D / 100: measured, plus a tenth.
GAPS = {
    "ProdigyGD": 0.144, "ProdigyDA": 0.108, "DAdaptReset": 0.96, "ProdigyCoordinate": 0.080, "DAdaptGD": 0.204,
    "DAdaptDA": 0.192, "DoG": 0.048, "LDoG": 0.048, "DoWG": 0.040, "AdagradNorm": 0.114,
    "NormalizedSubgradient": 0.113, "Polyak": 0.014,
}  # fmt: skip


@pytest.mark.parametrize("method", GAPS)
def test_the_gap_on_least_absolute_deviations(method):
    t = run(method, "lad")
    assert t.gap[-1] <= GAPS[method] * t.gap[0]


# -- the resisting oracle: the gradient is -1 until the solution is passed, so every step is known in closed form ------


@cache
def growth(method, G=0.0, most=1e30, steps=6000):
    """Distances and estimates after each step, in units of d0 (or of D = 1), until a distance of ``most``."""
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = make(method, [x], **options_of(method, 1.0, G))
    x.grad, rows = -torch.ones_like(x), []
    while len(rows) < steps and (not rows or rows[-1][0] < most):
        opt.step()
        rows.append((x.item(), opt.d, opt.d_hat, opt.average()[0].item() if len(rows) < 300 else 0.0))
    return np.array(rows).T


TARGETS = (1e3, 1e6, 1e9, 1e12, 1e20, 1e30)
GROWTH = {
    "ProdigyGD": (math.sqrt((1 + math.sqrt(5)) / 2), (30, 59, 88, 116, 193, 289)),
    "ProdigyDA": (1.172622950556, (44, 88, 131, 174, 290, 435)),
    "ProdigyCoordinate": (1.172622950556, (44, 88, 131, 174, 290, 435)),
    "DoWG": (1.839286755214, (13, 24, 36, 47, 77, 115)),
    "DAdaptReset": (None, (102, 205, 313, 421, 702, 1059)),
    "DAdaptGD": (None, (77, 255, 531, 905, 2376, 5179)),
    "DAdaptDA": (None, (93, 291, 591, 990, 2534, 5438)),
    "DoG": (None, (28, 80, 158, 260, 654, 1389)),
}


@pytest.mark.parametrize("method", GROWTH)
def test_growth(method):
    """Steps until x reaches D, for D / d0 of 1e3 to 1e30; and by which factor a step multiplies d in the end."""
    factor, steps = GROWTH[method]
    x, d, *_ = growth(method)
    assert tuple(int(np.argmax(x >= target)) + 1 for target in TARGETS) == steps
    if factor is not None:
        assert d[-1] / d[-2] == pytest.approx(factor, rel=1e-9)
    reach = np.maximum.accumulate(x)
    assert (reach[1:] < 2 * reach[:-1]).all()  # less than a doubling in a step


@pytest.mark.parametrize(
    ("method", "factor"),
    [("ProdigyGD", math.sqrt(1.5)), ("ProdigyDA", 1.1394350734343), ("ProdigyCoordinate", 1.1394350734343)],
)
def test_growth_with_a_bound_of_the_gradients(method, factor):
    d = growth(method, G=1.0)[1]
    assert d[-1] / d[-2] == pytest.approx(factor, rel=1e-9)


def test_the_factor_of_dual_averaging_is_a_root():
    factor = GROWTH["ProdigyDA"][0]
    assert math.sqrt(1 - factor**-2) == pytest.approx(factor**2 - 1 / factor, rel=1e-9)


def test_growth_of_d_adaptation_slows_down():
    for method in ("DAdaptGD", "DAdaptDA"):
        d = growth(method)[1]
        assert d[-1] / d[-2] == pytest.approx(1 + 0.5 / math.sqrt(len(d)), rel=3e-4)


def test_epochs_of_the_resetting():
    """A reset every 11 steps, with 2.0425707 times the estimate, back to x0."""
    x, d, *_ = growth("DAdaptReset")
    resets = np.flatnonzero(np.diff(d)) + 1
    assert (x[resets] == 0).all() and (np.delete(x, resets) > 0).all()
    assert (np.diff(resets)[30:] == 11).all()
    assert d[resets[-1]] / d[resets[-1] - 1] == pytest.approx(2.0425707, rel=1e-7)
    t = Run("DAdaptReset", PROBLEMS["abs"], 200, d0=1e-3, threshold=1.5)
    assert t.opt.epoch == np.count_nonzero(np.diff(t.d)) > 3
    assert (t.d[1:] / t.d[:-1])[np.flatnonzero(np.diff(t.d))].min() > 1.5


@pytest.mark.parametrize("method", [m for m in ESTIMATING if m != "DAdaptReset"])
def test_the_average_is_as_far_as_the_estimate_says(method):
    """In the linear phase abs(average - x0) = d_hat: both are sum w x / sum w."""
    _, _, d_hat, average = growth(method)
    assert average[:300] == pytest.approx(d_hat[:300], rel=1e-9)


def test_prodigy_is_never_behind_d_adaptation_before_the_solution():
    for form in ("GD", "DA"):
        ours, theirs = (growth(name + form)[1][:200] for name in ("Prodigy", "DAdapt"))
        assert (ours >= theirs).all()


@pytest.mark.parametrize("method", TOLD)
def test_what_is_told_is_the_step(method):
    """sum 1 / sqrt(k), in closed form."""
    x = growth(method, steps=50)[0]
    assert x == pytest.approx(np.cumsum(np.arange(1, 51) ** -0.5), rel=1e-12)
