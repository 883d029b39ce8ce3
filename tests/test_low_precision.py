"""Parameters and state of 16 bits: that they train, how accurately, and that nothing of it gets lost."""

import copy
import dataclasses
import io

import numpy as np
import prodigyopt
import pytest
import torch
from oracle import Case, Prodigyopt, numpy, record, replay, same, snapshot
from regression import START, regression
from toolbox import D0, make_params, parameters, train, wants_grad_dtype
from torch import nn

from prodigy_fused import Prodigy, low_precision, options

HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
MODES = [{"low_precision": mode} for mode in options.LOW_PRECISION]
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda options: options["low_precision"])


def start(backend, dtype=torch.bfloat16, **options):
    return backend(make_params(dtype, backend.device), **{"d0": D0, **options})


def on(backend, opt, **options):
    """Another optimizer on copies of the parameters of ``opt``, continued from its checkpoint by way of a file."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    again = backend([nn.Parameter(p.detach().clone()) for p in parameters(opt)], **{"d0": D0, **options})
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    return again


def skip_if_refused(dtype, options):
    if dtype == torch.float16 and options.get("low_precision") == "24bit":
        pytest.skip("refused")


def low_precision_backend():
    """Whether ``fused=True`` is to be had for 16 bits on this machine."""
    try:
        return Prodigy(make_params(torch.float16), fused=True)
    except RuntimeError:
        return None


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float32_d():
    return {kind: regression(kind)[0] for kind in START}


# Norms of 1.0 that have 0.02 to go have no more than five bfloat16 numbers on their way: stochastic rounding, which
# wanders among them, estimates a smaller distance.
@pytest.mark.parametrize(
    ("kind", "mode", "tolerance"),
    [
        ("weights", "stochastic", 0.1),
        ("weights", "displacement", 0.1),
        ("norms", "stochastic", 0.5),
        ("norms", "24bit", 0.05),
        ("norms", "displacement", 0.1),
    ],
)
def test_bfloat16_leaves_d0(float32_d, kind, mode, tolerance):
    d, moved = regression(kind, torch.bfloat16, low_precision=mode)
    assert float32_d[kind] > 1e-3
    assert d == pytest.approx(float32_d[kind], rel=tolerance)
    assert moved > 0.5


def test_bfloat16_state_does_not_slow_the_decay_of_s():
    """To nearest, a decay of 5e-4 a step is lost: |s| would be 1.8 times as large after 2,000 steps.

    One backend is enough: all of them round state with the same bits.
    """
    draw = torch.Generator().manual_seed(4)
    start = torch.randn(400, generator=draw)
    opts = [Prodigy([nn.Parameter(start.clone())], state_dtype=t, d_coef=1e-9) for t in (torch.bfloat16, torch.float32)]
    for _ in range(2000):
        grad = torch.randn(400, generator=draw)
        for opt in opts:
            opt.param_groups[0]["params"][0].grad = grad
            opt.step()
    half, full = (opt.param_groups[0]["d_denom"] for opt in opts)
    assert half == pytest.approx(full, rel=0.05)


def test_float16_leaves_d0(float32_d):
    d, moved = regression("weights", torch.float16)  # by displacement
    assert d == pytest.approx(float32_d["weights"], rel=0.01)
    assert moved > 0.9


def test_rounding_to_nearest_that_never_starts_is_said_once():
    with pytest.warns(UserWarning, match=r"parameter 0 of shape \(256, 256\).*moved in 10 steps.*stochastic") as caught:
        d, moved = regression("norms", torch.bfloat16, steps=25, low_precision="nearest")
    assert (d, moved, len(caught)) == (1e-6, 0.0, 1)


def test_steps_with_lr_0_are_not_waited_for():
    p = nn.Parameter(torch.ones(3).bfloat16())
    opt = Prodigy([p], low_precision="nearest", lr=0.0)
    for _ in range(low_precision.STUCK_AFTER_STEPS + 1):
        p.grad = torch.ones_like(p)
        opt.step()
    opt.param_groups[0]["lr"] = 1.0
    with pytest.warns(UserWarning, match="moved in 10 steps"):
        for _ in range(low_precision.STUCK_AFTER_STEPS):
            opt.step()


def test_of_a_sample_no_more_is_said_than_was_looked_at():
    p = nn.Parameter(torch.tensor([1.0, 1e-9, 1e-9]).bfloat16())
    opt = Prodigy([p], low_precision="nearest", slice_p=3)
    with pytest.warns(UserWarning, match="no element that the estimate looks at"):
        for _ in range(low_precision.STUCK_AFTER_STEPS):
            p.grad = torch.ones_like(p)
            opt.step()
    assert p[0] == 1 and p[1] < 0


def test_no_warning_without_a_cause(backend, recwarn):
    for kind in ({}, {"lr": 0.0}, {"low_precision": "stochastic"}):
        opt = start(backend, **{"low_precision": "nearest", "d0": 1.0 if kind == {} else 1e-6, **kind})
        train(opt, steps=12)
    assert not [w for w in recwarn if "moved" in str(w.message)]


CASES = [Case(steps=200), Case({"use_bias_correction": True, "weight_decay": 0.05}, steps=200, seed=1)]


@each_half
def test_a_displacement_is_as_accurate_as_float32_master_weights(dtype):
    ratios = []
    for case in CASES:
        run = record(case)
        grads = [[g.to(dtype).double() for g in step] for step in run.grads]
        run = dataclasses.replace(run, start=[p.to(dtype).double() for p in run.start], grads=grads)
        d, x, _ = replay(Prodigyopt, run, torch.float64)
        their_d, their_x, _ = replay(Prodigyopt, run, torch.float32)

        def make(groups, **options):
            return Prodigy(groups, low_precision="displacement", **options)

        our_d, _, opt = replay(make, run, dtype)
        masters = [(opt.state[p]["p0"].double() + opt.state[p]["delta"].double()) for p in parameters(opt)]
        for p, master in zip(parameters(opt), masters, strict=True):
            assert torch.equal(p, master.float().to(dtype).view_as(p))
        ours = np.concatenate([numpy(t.expand_as(p)) for t, p in zip(masters, parameters(opt), strict=True)])
        errors = [
            [np.abs(ds / d - 1).max(), np.abs(xs - x[-1]).max()] for ds, xs in [(our_d, ours), (their_d, their_x[-1])]
        ]
        ratios.append(np.divide(*errors))
    assert np.exp(np.log(ratios).mean(0)).max() <= 2


def test_second_moments_of_16_bits_are_right_on_average(backend):
    averages = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(3000, device=backend.device))
        opt = backend([p], state_dtype=dtype, d0=1e-3, d_coef=1e-9)
        for _ in range(backend.steps(200)):
            p.grad = torch.full_like(p, 0.7)
            opt.step()
        assert {opt.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq", "s")} == {dtype}
        averages[dtype] = opt.state[p]["exp_avg_sq"].double().mean().item()
    # To nearest, terms of a thousandth would stop counting at a quarter of the way.
    assert averages[torch.bfloat16] == pytest.approx(averages[torch.float32], rel=2e-3)


# -- gradients, scalers, lists -----------------------------------------------------------------------------------------


@wants_grad_dtype
@each_half
@each_mode
def test_gradients_may_be_float32(backend, dtype, mode):
    skip_if_refused(dtype, mode)
    same_dtype, wide = start(backend, dtype, **mode), start(backend, dtype, **mode)
    for p in parameters(wide):
        p.grad_dtype = None
    for t in range(4):
        train(same_dtype, steps=1, start=t)
        for i, (p, q) in enumerate(zip(parameters(wide), parameters(same_dtype), strict=True)):
            # Some of them, and in the last step in another memory order.
            p.grad = q.grad.float() if i % 2 else q.grad.clone()
            if t == 3 and p.dim() > 1:
                p.grad = p.grad.mT.contiguous().mT
        wide.step()
    if backend.name not in ("cuda", "emulated"):
        assert same(snapshot(same_dtype), snapshot(wide))
        return
    # Another kernel takes them, which adds up the same terms in another order.
    assert same_dtype.d == pytest.approx(wide.d, rel=1e-5)
    for p, q in zip(parameters(same_dtype), parameters(wide), strict=True):
        assert torch.allclose(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.skipif(low_precision_backend() is None, reason="no compiled backend here")
def test_grad_scaler_with_float16():
    """With ``fused=True``: torch's scaler unscales float16 gradients in no other optimizer."""
    plain, scaled = (Prodigy(make_params(torch.float16), d0=1e-6, fused=fused) for fused in (None, True))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # it makes its scale when first used
    for t in range(6):
        train(plain, steps=1, start=t)
        for factor in [torch.inf, 8.0] if t == 3 else [8.0]:
            before = snapshot(scaled)
            for p, q in zip(parameters(scaled), parameters(plain), strict=True):
                p.grad = q.grad * factor
            scaler.step(scaled)
            scaler.update(8.0)
            assert same(before, snapshot(scaled)) == (factor == torch.inf)
    assert same(snapshot(plain)[:2], snapshot(scaled)[:2])
    assert scaled.d > 1e-6 and all(p.isfinite().all() for p in parameters(scaled))


def test_one_list_of_all_types(backend):
    params = [p for dtype in (torch.float64, torch.float32, *HALVES) for p in make_params(dtype, backend.device)]
    wide = [nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in params]
    opt, exact = backend(params, d0=D0, low_precision="displacement"), backend(wide, d0=D0)
    for t in range(4):
        train(opt, steps=1, start=t)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.double()
        exact.step()
    assert opt.d == pytest.approx(exact.d, rel=1e-4) and opt.d > 10 * D0
    for p, q in zip(params, wide, strict=True):
        assert (p - q).abs().max() <= max(torch.finfo(p.dtype).eps, 1e-4) * q.abs().max()


def test_what_other_code_writes_into_x_stays(backend):
    opt = start(backend, low_precision="displacement")
    train(opt, steps=3)
    p = parameters(opt)[0]
    with torch.no_grad():
        p.mul_(2)
    written = p.detach().clone()
    train(opt, steps=1, start=3)
    assert (p - written).abs().max() < 0.1 * written.abs().min() + 0.02
    master = opt.state[p]["p0"].float() + opt.state[p]["delta"]
    assert torch.equal(master.to(p.dtype), p)


# -- state and checkpoints ---------------------------------------------------------------------------------------------

STATE_BYTES = [  # of a 16-bit parameter
    ({"low_precision": "stochastic"}, 14),
    ({"low_precision": "stochastic", "slice_p": 10}, 8.6),
    ({"low_precision": "nearest"}, 14),
    ({"low_precision": "24bit", "slice_p": 10, "state_dtype": torch.bfloat16}, 5.4),
    ({"low_precision": "displacement"}, 18),
    ({"low_precision": "stochastic", "state_dtype": torch.bfloat16}, 8),
    ({"low_precision": "displacement", "state_dtype": torch.bfloat16}, 12),
    ({"low_precision": "nearest", "state_dtype": None}, 8),
    ({"low_precision": "stochastic", "state_dtype": torch.bfloat16, "betas": (0.0, 0.999), "slice_p": 10}, 2.4),
]


@pytest.mark.parametrize(("options", "size"), STATE_BYTES, ids=str)
@each_half
def test_bytes_of_state(backend, dtype, options, size):
    skip_if_refused(dtype, options)
    p = nn.Parameter(torch.ones(1000, dtype=dtype, device=backend.device))
    opt = backend([p], **options)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert sum(t.untyped_storage().nbytes() for t in filter(torch.is_tensor, opt.state[p].values())) == size * 1000
    assert opt.state[p]["p0"].dtype == dtype


@each_half
@each_mode
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", None], ids=str)
def test_a_resumed_run_is_the_same_run(backend, dtype, mode, state_dtype):
    if dtype == torch.float16 and state_dtype is None:
        pytest.skip("v underflows, as the reference's, and x is NaN")
    skip_if_refused(dtype, mode)
    opt = start(backend, dtype, state_dtype=state_dtype, **mode)
    train(opt, steps=4)
    again = on(backend, opt, state_dtype=state_dtype, **mode)
    train(opt, again, steps=3, start=4)
    assert same(snapshot(opt), snapshot(again))


@each_mode
def test_to_and_from_prodigyopt(backend, mode):
    opt = start(backend, **mode)
    train(opt, steps=4)
    theirs = prodigyopt.Prodigy([nn.Parameter(p.detach().clone()) for p in parameters(opt)], d0=D0)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(theirs, steps=2, start=4)
    back = on(backend, theirs, **mode)
    assert back.step_count == 6 and back.d == pytest.approx(theirs.param_groups[0]["d"])
    train(back, theirs, steps=1, start=6)
    for p, q in zip(parameters(back), parameters(theirs), strict=True):
        assert (p - q).abs().max() < 0.03 * q.abs().max()
        if mode["low_precision"] == "displacement":
            state = back.state[p]
            assert torch.equal((state["p0"].float() + state["delta"]).to(p.dtype), p)


def test_the_option_may_change_in_a_run(backend):
    opt = start(backend, low_precision="displacement")
    for t, mode in enumerate(["displacement", "stochastic", "24bit", "nearest", "displacement"]):
        opt.param_groups[0]["low_precision"] = mode
        train(opt, steps=1, start=t)
        for p in parameters(opt):
            assert ("delta" in opt.state[p]) == (mode == "displacement")
            assert ("low" in opt.state[p]) == (mode == "24bit")
    state, p = opt.state[parameters(opt)[0]], parameters(opt)[0]
    assert torch.equal((state["p0"].float() + state["delta"]).to(p.dtype), p)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit", "min_8bit_size": 1}], ids=["float32", "8 bits"])
def test_a_displacement_once_the_start_was_given_back(backend, options):
    """It counts from where the parameter is: in the run that is cast, and in one that goes on from its checkpoint, also
    where the weights are loaded after that."""
    opt = start(backend, torch.float32, prodigy_steps=3, **options)
    train(opt, steps=4)
    for p in parameters(opt):
        p.data, p.grad = p.data.half(), None
    opt.param_groups[0]["state_dtype"] = "float32"
    again, late = on(backend, opt), backend([torch.full_like(p, float("inf")) for p in parameters(opt)], d0=D0)
    late.load_state_dict(opt.state_dict())
    before = [p.detach().float() for p in parameters(opt)]
    for p, q in zip(parameters(opt), parameters(late), strict=True):
        q.data.copy_(p)
    train(opt, again, late, start=4)
    assert same(snapshot(opt), snapshot(again)) and same(snapshot(opt), snapshot(late))
    for p, x in zip(parameters(opt), before, strict=True):
        state = opt.state[p]
        assert torch.equal((state["p0"].float() + state["delta"]).half(), p)
        assert torch.equal(state["p0"].float(), x) and state["delta"].abs().min() > 0


@pytest.mark.parametrize(
    ("dtype", "slice_p", "mode"),
    [
        (torch.bfloat16, 1, "24bit"),
        (torch.bfloat16, 11, "24bit"),
        (torch.float16, 1, "displacement"),
        (torch.float16, 11, "stochastic"),
        (torch.float32, 1, None),
    ],
)
def test_what_is_chosen_by_itself(dtype, slice_p, mode):
    group = Prodigy([torch.zeros(1)], slice_p=slice_p).param_groups[0]
    assert low_precision.mode_of(torch.zeros(3, dtype=dtype), group) == mode


def test_a_displacement_needs_all_of_x0():
    with pytest.raises(ValueError, match=r"low_precision.*'displacement'.*stochastic.*slice_p"):
        Prodigy(make_params(torch.bfloat16), slice_p=2, low_precision="displacement")
