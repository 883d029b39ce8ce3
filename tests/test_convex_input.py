"""prodigy_fused.convex: checkpoints, and bad input, which changes nothing."""

import copy
import io

import numpy as np
import pytest
import torch
from convex_oracle import (
    ALL,
    DISTANCE,
    ESTIMATING,
    advance,
    feed,
    joined,
    make,
    normal,
    other,
    problems,
    same,
    split,
    start,
    step,
)  # fmt: skip
from toolbox import parameters, refused
from torch import nn

from prodigy_fused import convex

# -- checkpoints ---------------------------------------------------------------------------------------------------


def saved(opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ALL)
def test_a_checkpoint_continues_bit_by_bit(method, dtype):
    """Loaded, copied, or pickled, in the middle of a run (and the state of float32 parameters stays float64)."""
    opt = start(method, [nn.Parameter(p.to(dtype)) for p in split(normal(3, 9))])
    for k in range(7):
        step(opt, k, without=(2,) if method == "DAdaptAdam" else ())
    again = start(method, [nn.Parameter(p.detach().clone()) for p in parameters(opt)], **other(method))
    state = saved(opt)
    again.load_state_dict(state)
    both = [again, copy.deepcopy(opt)]
    kept = copy.deepcopy(state)
    for k in range(7, 12):
        for each in (opt, *both):
            step(each, k)
    assert [same(opt, each) for each in both] == [True, True]
    assert repr(kept) == repr(state)  # steps do not write to what was saved


def test_a_checkpoint_from_before_the_first_step():
    opt, again = start("DoG"), start("DoG", d0=0.5)
    again.load_state_dict(opt.state_dict())
    step(opt, 0)
    step(again, 0)
    assert same(opt, again)


def test_weights_are_copied_with_the_optimizer():
    opt = start("ProdigyGD", weights=abs)
    assert copy.deepcopy(opt).weights is abs


CORRUPT = {
    "another method": (lambda s: s["param_groups"][0].update(method="ProdigyDA"), ["method 'ProdigyDA'"]),
    "no estimate": (lambda s: s["param_groups"][0].pop("estimates"), ["estimates"]),
    "a group less": (lambda s: s["param_groups"].pop(), ["[3]", "[]"]),
    "no state": (lambda s: s.pop("state"), ["'state'"]),
    "NaN": (lambda s: s["param_groups"][0]["estimates"][0].update(inner=float("nan")), ["corrupt", "nan"]),
    "no d": (lambda s: s["param_groups"][0]["estimates"][0].pop("d"), ["corrupt", "'d'"]),
    "an option": (lambda s: s["param_groups"][0].update(G=-1.0), ["G", "-1.0"]),
    "a shape": (lambda s: s["state"][1].update(z=torch.zeros(5)), ["z", "parameter 1 of shape (2,)", "(5,)"]),
    "a vector less": (lambda s: s["state"][1].pop("mean"), ["mean", "parameter 1 of shape (2,)"]),
    "a parameter less": (lambda s: s["state"].pop(2), ["parameter 2 of shape ()"]),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_bad_checkpoint_changes_nothing(what):
    opt = start("ProdigyGD")
    step(opt, 0)
    state = copy.deepcopy(opt.state_dict())
    change, words = CORRUPT[what]
    change(state)
    with refused(opt, ValueError, *words):
        opt.load_state_dict(state)


def test_a_checkpoint_of_two_estimates_for_one():
    a, b, c = split(normal(3, 9))
    opt = start("DoG", [{"params": [a, b]}, {"params": [c]}])
    step(opt, 0)
    state = copy.deepcopy(opt.state_dict())
    (estimate,) = state["param_groups"][1]["estimates"]
    state["param_groups"][1]["estimates"] = [{**estimate, "d": 2 * estimate["d"]}]
    with refused(opt, ValueError, "disagree on 'estimates'"):
        opt.load_state_dict(state)


# -- bad input ---------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    *(("ProdigyGD", "d0", value) for value in (0, -1, 1e-200, 1e200, float("nan"), "1", None, True, 1j)),
    *(("ProdigyDA", "G", value) for value in (-1, float("inf"), None)),
    ("DAdaptGD", "d0", 0), ("DAdaptDA", "G", -1), ("ProdigyCoordinate", "d0", -1), ("ProdigyGD", "weights", 3),
    ("DAdaptReset", "threshold", 0.5), ("DAdaptReset", "threshold", float("inf")), ("DoG", "d0", 0), ("LDoG", "d0", -1),
    ("DoWG", "d0", float("inf")), ("AdagradNorm", "D", 0), ("AdagradNorm", "D", None),
    ("NormalizedSubgradient", "D", -1), ("Polyak", "f_star", float("nan")), ("DAdaptAdam", "lr", -1),
    ("DAdaptAdam", "betas", (0.9, 1.0)), ("DAdaptAdam", "betas", 0.9), ("DAdaptAdam", "eps", 0),
    ("DAdaptAdam", "weight_decay", -1), ("DAdaptAdam", "decouple", 2), ("DAdaptAdam", "use_bias_correction", None),
    ("DAdaptAdam", "d0", 0), ("DAdaptAdam", "growth_rate", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "value"), ARGUMENTS)
def test_a_bad_argument_is_named(method, name, value):
    params = split(normal(3, 9))
    with pytest.raises(ValueError, match=rf"Invalid {name}: "):
        make(method, params, **{name: value})
    opt = make(method, params)
    step(opt, 0)
    if name != "weights":
        feed(opt, 1)
        opt.param_groups[0][name] = value
        with refused(opt, ValueError, f"Invalid {name}"):
            opt.step()
        with refused(opt, ValueError, f"Invalid {name}"):
            opt.add_param_group({"params": nn.Parameter(torch.zeros(2)), name: value})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "x", None])
def test_bad_weights_are_named(value):
    opt = start("ProdigyGD", weights=lambda k: 1 if k < 2 else value)
    step(opt, 0)
    step(opt, 1)
    feed(opt, 2)
    with refused(opt, ValueError, "weights(2)"):
        opt.step()


@pytest.mark.parametrize("closure", [None, lambda: None, lambda: float("nan"), lambda: torch.ones(2)])
def test_polyak_needs_the_loss(closure):
    opt = start("Polyak")
    step(opt, 0)
    feed(opt, 1)
    with refused(opt, ValueError, "closure"):
        opt.step(closure)


def test_closures_have_gradients():
    opt = start("Polyak")
    f = lambda: (joined(parameters(opt)) ** 2).sum()  # noqa: E731
    with torch.no_grad():
        loss = advance(opt, parameters(opt), problems()[2].f)
        opt.step(f)
    assert loss > 0


GRADIENTS = {
    "NaN": (lambda p: torch.full_like(p, float("nan")), ["parameter 1 of shape (2,)", "not finite"]),
    "infinite": (lambda p: torch.full_like(p, float("inf")), ["parameter 1 of shape (2,)", "not finite"]),
    "too large": (lambda p: torch.full_like(p, 1e200), ["too large"]),
}


@pytest.mark.parametrize("what", GRADIENTS)
@pytest.mark.parametrize("method", ALL)
def test_a_bad_gradient_changes_nothing(method, what):
    opt = start(method)
    for k in range(3):
        value, words = GRADIENTS[what]
        feed(opt, k)
        p = parameters(opt)[1]
        good, p.grad = p.grad, value(p)
        if what != "too large" or method != "DAdaptAdam":  # whose sums are of first powers
            with refused(opt, ValueError, *words):
                opt.step(lambda: 1.0)
        p.grad = good
        opt.step(lambda k=k: 1.0 + k)
    twin = start(method)
    for k in range(3):
        step(twin, k)
    assert same(opt, twin)


@pytest.mark.parametrize("method", [*ESTIMATING, *DISTANCE])
def test_a_parameter_that_is_not_finite_changes_nothing(method):
    opt = start(method)
    step(opt, 0)
    feed(opt, 1)
    with torch.no_grad():
        parameters(opt)[1][0] = float("inf")
    with refused(opt, ValueError, "not finite"):
        opt.step()


def test_a_sparse_gradient_and_another_shape():
    opt = start("ProdigyGD")
    step(opt, 0)
    p = parameters(opt)[1]
    p.grad = torch.ones(2).double().to_sparse()
    with refused(opt, RuntimeError, "parameter 1 of shape (2,)", "sparse"):
        opt.step()
    p.grad = None
    p.data = torch.ones(4).double()
    with refused(opt, ValueError, "parameter 1 of shape (4,)", "(2,)"):
        opt.step()


PARAMETERS = {
    "integers": (TypeError, lambda p: torch.ones(3, dtype=torch.int64)),
    "complex": (TypeError, lambda p: torch.ones(3, dtype=torch.complex64)),
    "no tensor": (TypeError, lambda p: 3),
    "a duplicate": (ValueError, lambda p: p),
    "no leaf": (ValueError, lambda p: p * 2),
    "expanded": (ValueError, lambda p: torch.ones(1).expand(3)),
    "meta": (ValueError, lambda p: torch.ones(3, device="meta")),
    "lazy": (ValueError, lambda p: nn.UninitializedParameter()),
}


@pytest.mark.parametrize("what", PARAMETERS)
def test_a_bad_parameter_is_named(what):
    error, bad = PARAMETERS[what]
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(error, match="parameter 1"):
        convex.DoG([p, bad(p)])
    opt = convex.DoG([p])
    with refused(opt, error, "parameter 1"):
        opt.add_param_group({"params": [bad(p)]})


@pytest.mark.parametrize("method", [*ESTIMATING, *DISTANCE, "AdagradNorm", "Polyak", "DAdaptAdam"])
def test_groups_must_agree(method):
    a, b, c = split(normal(3, 9))
    name, value = next(iter(other(method).items()))
    with pytest.raises(ValueError, match=f"0 and 1 disagree on {name}"):
        make(method, [{"params": [a, b]}, {"params": [c], name: value}])
    opt = make(method, [{"params": [a, b]}, {"params": [c]}])
    feed(opt, 0)
    opt.param_groups[1][name] = value
    with refused(opt, ValueError, f"0 and 1 disagree on {name}"):
        opt.step(lambda: 1.0)


def test_arguments_are_stored_as_numbers():
    """NumPy's, tensors and lists are as good as Python's own."""
    opt = convex.DAdaptAdam(
        [{"params": nn.Parameter(torch.zeros(2)), "betas": [0.9, 0.99]}, {"params": nn.Parameter(torch.zeros(1))}],
        betas=(0.9, 0.99),
        lr=torch.tensor(0.5),
        d0=np.float32(0.25),
    )
    for group in opt.param_groups:
        assert [group[name] for name in ("betas", "lr", "d0")] == [(0.9, 0.99), 0.5, 0.25]
        assert {type(group[name]) for name in ("lr", "d0")} == {float}
