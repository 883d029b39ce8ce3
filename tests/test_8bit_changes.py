"""``state_dtype="8bit"``: codes where the parameter, an option or the state is changed between steps."""

import copy

import pytest
import torch
from toolbox import D0, parameters, refused, train
from torch import nn

from prodigy_fused import Prodigy, coded_state

BF16 = torch.bfloat16
EIGHT = {"state_dtype": "8bit", "min_8bit_size": 1}


def make(dtype=torch.float32, **options):
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in ((300,), (3, 517))]
    return Prodigy(params, **EIGHT, d0=D0, **options)


def to_bfloat16(opt):
    for p in parameters(opt):
        p.data = p.data.to(BF16)


@pytest.mark.parametrize(
    ("change", "dtype", "options", "new"),
    [
        (to_bfloat16, torch.float32, {}, "low"),
        (lambda opt: opt.param_groups[0].update(low_precision="24bit"), BF16, {"low_precision": "stochastic"}, "low"),
        (lambda opt: opt.param_groups[0].update(betas=(0.9, 0.99)), torch.float32, {"betas": (0.0, 0.99)}, "exp_avg"),
    ],
    ids=["to bfloat16", "24bit", "momentum"],
)
def test_what_comes_later_is_zero_and_codes_stay(change, dtype, options, new):
    opt = make(dtype, **options)
    train(opt, steps=3)
    before = [{key: opt.state[p][key].clone() for key in ("exp_avg_sq", "s", "delta")} for p in parameters(opt)]
    change(opt)
    opt.param_groups[0]["lr"] = 0.0
    train(opt, steps=1, start=3)
    for p, codes in zip(parameters(opt), before, strict=True):
        assert not opt.state[p][new].any() and opt.state[p][new].shape == p.shape
        assert all(torch.equal(opt.state[p][key], t) for key, t in codes.items())
    opt.param_groups[0]["lr"] = 1.0
    train(opt, steps=2, start=4)
    assert all(coded_state.in_codes(opt.state[p]) and opt.state[p][new].any() for p in parameters(opt))


@pytest.mark.parametrize("compact", [False, True])
def test_a_checkpoint_without_the_byte_is_loaded(compact):
    opt, other = make(BF16, low_precision="stochastic"), make(BF16)
    train(opt, steps=3)
    state = copy.deepcopy(opt.compact_state_dict() if compact else opt.state_dict())
    del state["param_groups"][0]["low_precision"]
    other.load_state_dict(state)
    train(other, steps=1, start=3)
    assert all(other.state[p]["low"].any() for p in parameters(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compact", [False, True])
def test_a_checkpoint_of_bfloat16_for_a_model_of_more_bits(dtype, compact):
    """The weights that are read and those of the model are the same at once, and not only after a step."""
    opt, other = make(BF16), make(dtype)
    train(opt, steps=3)
    exact = opt.float32_weights().values()
    other.load_state_dict(opt.compact_state_dict() if compact else opt.state_dict())
    for p, x in zip(parameters(other), exact, strict=True):
        p.data.copy_(x)
    assert all(torch.equal(p, x) for p, x in other.float32_weights().items())
    train(other, steps=1, start=3)
    assert all("low" not in other.state[p] for p in parameters(other))


def test_codes_without_a_scale_are_no_numbers():
    opt = make(slice_p=3)
    train(opt, steps=2)
    del opt.state[parameters(opt)[1]]["scale"]
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 of shape \(3, 517\) is torch.uint8"):
        train(opt, steps=1)


def test_numbers_among_codes_are_refused():
    opt = make()
    train(opt, steps=2)
    state = opt.compact_state_dict()
    state["state"][1]["exp_avg"] = torch.full((3, 517), 0.25)
    other = make()
    with refused(other, ValueError, "'exp_avg' of parameter 1", "torch.float32"):
        other.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"slice_p": 3}], ids=str)
def test_a_parameter_that_becomes_float64(options):
    """Its state does so, too: numbers, with the start."""
    opt = make(**options)
    x0 = [p.detach().clone() for p in parameters(opt)]
    train(opt, steps=3)
    state = opt.compact_state_dict()
    for p in parameters(opt):
        p.data = p.data.double()
    train(opt, steps=1, start=3)
    for p, start in zip(parameters(opt), x0, strict=True):
        kept = opt.state[p]
        assert kept["exp_avg"].dtype == kept["p0"].dtype == torch.float64 and "scale" not in kept
        assert torch.allclose(kept["p0"].flatten(), start.flatten()[:: options.get("slice_p", 1)].double(), atol=D0)
    double = make(torch.float64, **options)
    double.load_state_dict(copy.deepcopy(state))
    train(double, steps=1, start=3)
    assert all(double.state[p]["exp_avg_sq"].dtype == torch.float64 for p in parameters(double))


def test_of_what_is_given_back_no_trace_is_left():
    opt = make(prodigy_steps=2)
    train(opt, steps=3)
    for p in parameters(opt):
        assert "delta" not in opt.state[p] and not opt.state[p]["scale"][:, 2:].any()
        assert opt.state[p]["scale"][:, :2].all()


def test_a_scale_at_an_odd_address_is_moved():
    opt = make()
    train(opt, steps=1)
    state = opt.state[parameters(opt)[0]]
    scale = state["scale"]
    state["scale"] = torch.empty(scale.numel() + 1, dtype=torch.uint8)[1:].view_as(scale).copy_(scale)
    train(opt, steps=1, start=1)
    assert state["scale"].data_ptr() % 4 == 0


@pytest.mark.parametrize("kept", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("loaded", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("compact", [False, True])
def test_a_checkpoint_of_another_order_of_memory(kept, loaded, compact):
    """Blocks of codes go by the order in memory, and rows that differ in size would show any other order."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.logspace(-3, 1, 16)[:, None, None, None]
    p = nn.Parameter(torch.randn(16, 16, 3, 3, generator=draw).to(memory_format=kept))
    target = rows * torch.randn(p.shape, generator=draw)
    q = nn.Parameter(p.detach().clone(memory_format=loaded))
    opt, again = (Prodigy([t], **EIGHT, d0=0.01) for t in (p, q))
    for _ in range(20):
        p.grad = p.detach() - target
        opt.step()
    again.load_state_dict(copy.deepcopy(opt.compact_state_dict() if compact else opt.state_dict()))
    q.data.copy_(p)
    q.grad, again.param_groups[0]["lr"] = torch.ones_like(q), 0.0
    again.step()  # changes nothing but the form of the state
    before, after = opt.state_dict()["state"][0], again.state_dict()["state"][0]
    for key in ("exp_avg", "exp_avg_sq", "s", "p0"):
        rounded = p.detach().flatten() - before["p0"] if key == "p0" else before[key]
        bound = 0.0 if kept == loaded else rounded.abs().max().item() / 63  # a unit, or two: the largest may be cut off
        torch.testing.assert_close(after[key], before[key], rtol=0.07 if bound else 0.0, atol=bound)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("slice_p", [1, 3])
def test_a_checkpoint_once_the_estimate_has_ended(slice_p, compact):
    opt, again = (make(slice_p=slice_p, prodigy_steps=2) for _ in range(2))
    train(opt, steps=3)
    again.load_state_dict(copy.deepcopy(opt.compact_state_dict() if compact else opt.state_dict()))
    for p, q in zip(parameters(opt), parameters(again), strict=True):
        q.data.copy_(p)
    train(opt, again, steps=1, start=3)
    assert all(torch.equal(p, q) for p, q in zip(parameters(opt), parameters(again), strict=True))
    for state_dtype in ("float32", "8bit"):
        opt.param_groups[0]["state_dtype"] = state_dtype
        train(opt, steps=1, start=4)
        assert all("p0" not in opt.state[p] for p in parameters(opt))
