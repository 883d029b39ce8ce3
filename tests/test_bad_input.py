"""Everything that must be refused: one exception that names the culprit, and nothing changed.

Contradictory choices of a backend are in test_selection.py, conflicts between groups in test_groups.py.
"""

import copy
import math

import numpy as np
import pytest
import torch
from toolbox import agree, device_of, feed, make, make_params, parameters, refused, train, twins
from torch import nn

from prodigy_fused import Prodigy

NAN, INF = math.nan, math.inf
EITHER = (TypeError, ValueError)
GOOD = torch.zeros(2, 2)

# -- hyper-parameters ----------------------------------------------------------------------------------------

NOT_NUMBERS = [NAN, "0.5", [0.5], 1j, torch.ones(2)]
BAD_VALUES = {
    "lr": [*NOT_NUMBERS, None, INF, -1.0, torch.tensor(-1.0), torch.tensor(NAN)],
    "eps": [*NOT_NUMBERS, None, INF, 0.0, -1e-8],
    "weight_decay": [*NOT_NUMBERS, None, INF, -0.1],
    "d0": [*NOT_NUMBERS, None, INF, 0.0, -1e-6],
    "d_coef": [*NOT_NUMBERS, None, INF, 0.0, -1.0],
    "growth_rate": [*NOT_NUMBERS, None, 0.0, 0.99, -INF],
    "beta3": [*NOT_NUMBERS, INF, 1.0, -0.1],
    "betas": [NAN, None, 0.9, "ab", (0.9,), (0.9, 0.99, 0.999), (NAN, 0.99), (0.9, NAN), (1.0, 0.99),
              (0.9, 1.0), (-0.1, 0.99), (0.9, -0.1), ("0.9", "0.99"), (None, 0.99)],
    "slice_p": [*NOT_NUMBERS, None, 0, -1, 1.5, 2.0, True, 2**62],
    "state_dtype": ["float64", "int32", torch.int32, torch.complex64, 32],
    "low_precision": ["exact", 1, True, np.ones(2)],
    "decouple": ["False", None, 0.5, np.ones(2)],
    "use_bias_correction": ["False", None],
    "safeguard_warmup": ["no", None],
    "maximize": ["x", None],
    "fsdp_in_use": ["False", None],
    "fused": ["yes", 0.5],
    "foreach": ["yes", 0.5],
    "capturable": ["yes", None],
    "backend": [3, True, "", []],
}  # fmt: skip
CASES = [pytest.param(n, v, id=f"{n}={v!r}") for n, values in BAD_VALUES.items() for v in values]
# Without True for 1, and pairs for numbers: nobody writes those into a running optimizer.
WRITTEN = [case for case in CASES if case.values[1] is not True and not torch.is_tensor(case.values[1])]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_hyper_parameters_are_checked_at_construction(name, value):
    with pytest.raises(EITHER, match=rf"\b{name}\b"):
        Prodigy([GOOD], **{name: value})
    with pytest.raises(EITHER, match=rf"\b{name}\b"):
        Prodigy([{"params": [GOOD]}, {"params": [torch.zeros(3)], name: value}])


@pytest.mark.parametrize("numbers", [{"d0": 1e-100}, {"d0": 1e-30}, {"eps": 1e-33}])
def test_a_start_whose_steps_float32_cannot_have(numbers):
    """Without a gradient they are 0 / (d * eps): on a GPU NaN if d * eps is subnormal, where it is approximate."""
    with pytest.raises(ValueError, match=r"Invalid d0.*eps"):
        Prodigy([GOOD], **numbers)
    Prodigy([GOOD], d0=1e-29)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_hyper_parameters_are_checked_when_a_group_is_added(name, value):
    opt = make()
    train(opt, steps=2)
    with refused(opt, EITHER, name):
        opt.add_param_group({"params": [torch.zeros(3)], name: value})


@pytest.mark.parametrize(("name", "value"), WRITTEN)
def test_hyper_parameters_are_checked_when_they_were_written_between_steps(name, value):
    opt = make()
    train(opt, steps=2)
    good, opt.param_groups[0][name] = opt.param_groups[0][name], value
    feed(opt, 2)
    with refused(opt, EITHER, name):
        opt.step()
    opt.param_groups[0][name] = good
    opt.step()


@pytest.mark.parametrize("name", ["betas", "eps", "weight_decay", "d_coef"])
def test_only_lr_may_be_a_tensor_on_a_device(name):
    there = torch.ones((), device="meta")
    with pytest.raises(ValueError, match=f"Invalid {name}.*only lr"):
        Prodigy([GOOD], **{name: (0.9, there) if name == "betas" else there})


def test_slice_p_cannot_change_under_way():
    opt = make()
    train(opt, steps=2)
    opt.param_groups[0]["slice_p"] = 2
    feed(opt, 2)
    with refused(opt, ValueError, "parameter 0", "(4, 3)", "(6,)"):
        opt.step()


BAD_ESTIMATES = [
    *({"d": value} for value in (NAN, 0.0, -1.0, INF, None, "text", torch.tensor(NAN))),
    {"d": 0.5, "k": -1},
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("bad", BAD_ESTIMATES, ids=repr)
def test_a_bad_estimate_written_by_the_user(bad, steps):
    opt, undisturbed = make(), make()
    train(opt, undisturbed, steps=steps)
    good = dict(opt.param_groups[0])
    opt.param_groups[0].update(bad)
    feed(opt, steps)
    with refused(opt, EITHER, *map(str, list(bad.items())[-1])):
        opt.step()
    opt.param_groups[0].update(good)
    train(opt, undisturbed, steps=2, start=steps)
    agree(opt, undisturbed, rtol=0.0)


# -- parameters ----------------------------------------------------------------------------------------------

P1 = ["parameter 1", "(4,)"]
BAD_PARAMETERS = {
    "integer": (lambda: torch.zeros(4, dtype=torch.int64), TypeError, [*P1, "int64"]),
    "bool": (lambda: torch.zeros(4, dtype=torch.bool), TypeError, [*P1, "bool"]),
    "complex": (lambda: torch.zeros(4, dtype=torch.complex64), TypeError, [*P1, "complex64", "view_as_complex"]),
    "float8": (lambda: torch.zeros(4, dtype=torch.float8_e4m3fn), TypeError, [*P1, "float8_e4m3fn"]),
    "sparse": (lambda: torch.zeros(4).to_sparse(), ValueError, [*P1, "sparse"]),
    "expanded": (lambda: torch.zeros(1).expand(4), ValueError, [*P1, "expanded", "clone"]),
    "overlapping": (lambda: torch.zeros(5).as_strided((3, 3), (1, 1)), ValueError, ["parameter 1", "(3, 3)"]),
    "negated": (lambda: torch._neg_view(torch.ones(4)), ValueError, [*P1, "resolve_neg"]),
    "non-leaf": (lambda: torch.zeros(4, requires_grad=True) * 2, ValueError, [*P1, "leaf"]),
    "number": (lambda: 3.0, TypeError, ["parameter 1", "float"]),
    "name": (lambda: "weight", TypeError, ["parameter 1", "str"]),
    "None": (lambda: None, TypeError, ["parameter 1", "None"]),
    "module": (lambda: nn.Linear(2, 2), TypeError, ["parameter 1", "Linear"]),
}


@pytest.mark.parametrize(("bad", "error", "words"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_parameters(bad, error, words):
    for params in ([GOOD, bad()], [{"params": [GOOD]}, {"params": [bad()]}]):
        with pytest.raises(error) as caught:
            Prodigy(params)
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    opt = Prodigy([GOOD])
    with refused(opt, error, *words):
        opt.add_param_group({"params": [bad()]})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_frozen_parameters_of_other_dtypes_come_along(dtype):
    """As in ``Prodigy(model.parameters())`` of a quantised model with adapters."""
    codes, p = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False), nn.Parameter(torch.ones(3))
    opt = Prodigy([codes, p])
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
        opt.load_state_dict(opt.state_dict())
    assert [*opt.state] == [*opt.float32_weights()] == [p]
    codes.grad = torch.ones(4).to(dtype)
    with refused(opt, TypeError, "parameter 0", str(dtype)):
        opt.step()


class Codes(torch.Tensor):
    """As torchao has them: of the dtype that they stand for."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default
        return cls(args[0].shape)


def test_frozen_parameters_that_wrap_other_tensors_come_along(backend):
    codes, p = nn.Parameter(Codes((4,)), requires_grad=False), nn.Parameter(torch.ones(3, device=device_of(backend)))
    opt = make(backend, [codes, p])
    p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert [*opt.state] == [*opt.float32_weights()] == [p]
    with pytest.raises((ValueError, RuntimeError), match=r"wrapper|subclass"):
        Prodigy([nn.Parameter(Codes((4,)))], backend="cpu")


def test_a_parameter_in_two_groups_is_refused():
    """It would be stepped twice. Twice in one group, it is stepped once, with torch's warning."""
    words = ["parameter 1", "(2, 2)", "duplicate", "parameter 0"]
    opt = Prodigy([GOOD])
    with refused(opt, ValueError, *words):
        opt.add_param_group({"params": [GOOD]})


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty"),
        (iter([]), ValueError, "empty"),
        (GOOD, TypeError, "iterable"),
        (None, TypeError, "itera"),
        (nn.Linear(2, 2), TypeError, "iterable"),
        ({GOOD, torch.zeros(3)}, TypeError, "list"),
        ([{"params": {GOOD, torch.zeros(3)}}], TypeError, "list"),
        ([{"weights": [GOOD]}], (*EITHER, KeyError), "params"),
        ([("w", GOOD), torch.zeros(3)], ValueError, "names"),
        ([{"params": [("w", GOOD)]}, {"params": [torch.zeros(3)]}], ValueError, "names"),
    ],
)
def test_bad_collections_of_parameters(params, error, words):
    with pytest.raises(error, match=words):
        Prodigy(params)


@pytest.mark.parametrize("group", [[GOOD], GOOD, None, "params"])
def test_a_group_must_be_a_dictionary(group):
    opt = make()
    with refused(opt, TypeError, "dict"):
        opt.add_param_group(group)


def test_parameters_that_share_memory(backend):
    """Tied weights, untied by ``load_state_dict(assign=True)``: a pass that is one for both would run into itself."""
    memory = torch.ones(8, dtype=torch.float64, device=backend.device)
    opt = make(backend, [nn.Parameter(memory[4:]), nn.Parameter(memory.clone()), nn.Parameter(memory[:5])])
    feed(opt, 0)
    if backend.one_pass:
        with refused(opt, ValueError, "parameter 0", "(4,)", "parameter 2", "(5,)", "assign=True"):
            opt.step()
        parameters(opt)[2].data = memory[:4]
        feed(opt, 0)
    opt.step()


# -- gradients -----------------------------------------------------------------------------------------------


def give(p, data):
    """PyTorch checks what is assigned to ``grad``, but not a later ``p.data = ...``."""
    p.grad = torch.ones_like(p)
    p.data = data


BAD_GRADIENTS = {
    "other size": (lambda p: give(p, torch.ones(9).to(p)), ["shape", "(9,)", "4"]),
    "other shape": (lambda p: give(p, torch.ones(2, 2).to(p)), ["shape", "(2, 2)", "4"]),
    "dtype": (lambda p: give(p, p.data.half()), ["dtype", "float16", "float64"]),
    "sparse": (lambda p: setattr(p, "grad", torch.ones_like(p).to_sparse()), ["(4,)", "sparse"]),
}


@pytest.mark.parametrize("steps", [0, 2], ids=["first", "third"])
@pytest.mark.parametrize(("spoil", "words"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_one_bad_gradient_among_many(backend, steps, spoil, words):
    params = parameters(make(backend))
    opt = make(backend, [*params, nn.Parameter(torch.ones(4).to(params[0]))], weight_decay=0.1)
    train(opt, steps=steps)
    feed(opt, steps)
    spoil(parameters(opt)[-1])
    with refused(opt, (*EITHER, RuntimeError), "parameter 4", *words):
        opt.step()


def without_memory(opt):
    p = opt.param_groups[0]["params"][-1] = nn.Parameter(torch.ones(4, device="meta"))
    p.grad = torch.ones_like(p)


def other_shape_than_the_state(opt):
    p = parameters(opt)[-1]
    give(p, p.data[:, :1].clone())
    p.grad = torch.ones_like(p)


def overlapping(opt):
    p = parameters(opt)[-1]
    p.data = p.data[:, :1].expand(2, 3, 2, 2)


SWAPS = [
    (without_memory, ["(4,)", "meta"]),
    (other_shape_than_the_state, ["(2, 1, 2, 2)", "(2, 3, 2, 2)"]),
    (overlapping, ["(2, 3, 2, 2)", "share memory"]),
]


@pytest.mark.parametrize(("swap", "words"), SWAPS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("late", [(), (0, 1)], ids=["all started", "some without state"])
def test_tensors_swapped_for_unfit_ones(backend, swap, words, late):
    opt = make(backend)
    feed(opt, 0, without=late)
    opt.step()
    feed(opt, 1)
    swap(opt)
    with refused(opt, EITHER, "parameter 3", *words):
        opt.step()


def freed(t):
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize(("spoil", "word"), [(freed, "memory"), (torch.Tensor.to_sparse, "sparse")])
def test_state_swapped_for_unfit_tensors(backend, spoil, word):
    if not backend.one_pass:
        pytest.skip("gives its state to torch's operations without a look")
    opt = make(backend)
    train(opt, steps=1)
    feed(opt, 1)
    state = opt.state[parameters(opt)[3]]
    state["exp_avg_sq"] = spoil(state["exp_avg_sq"].clone())
    with pytest.raises(ValueError, match=rf"'exp_avg_sq' of parameter 3 of shape \(2, 3, 2, 2\) .*{word}"):
        opt.step()


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", ["text", torch.ones(2)], ids=str)
def test_what_a_scaler_sets(backend, name, value):
    opt = make(backend)
    setattr(opt, name, value)
    feed(opt, 0)
    with refused(opt, ValueError, name):
        opt.step()


# -- checkpoints ---------------------------------------------------------------------------------------------

NUMBERS = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")


def change(**numbers):
    return lambda saved: [group.update(numbers) for group in saved["param_groups"]]


def drop(*keys):
    return lambda saved: [group.pop(key) for group in saved["param_groups"] for key in keys]


def put(i, key, value):
    return lambda saved: saved["state"][i].update({key: value})


CORRUPT = {
    "no groups": (lambda saved: saved.pop("param_groups"), ["param_groups"]),
    "no state": (lambda saved: saved.pop("state"), ["state"]),
    "more groups": (lambda saved: saved["param_groups"].append({"params": [9]}), ["[4]", "[4, 1]"]),
    "fewer parameters": (lambda saved: saved["param_groups"][0]["params"].pop(), ["[4]", "[3]"]),
    "no estimate": (drop("d", "d_max", "d_numerator"), ["'d'", "'d_max'", "'d_numerator'"]),
    "other slice_p": (change(slice_p=11), ["slice_p=11", "slice_p=1"]),
    **{f"NaN {name}": (change(**{name: NAN}), [name, "nan"]) for name in (*NUMBERS, "lr", "eps", "d_coef")},
    **{f"infinite {name}": (change(**{name: INF}), [name, "inf"]) for name in NUMBERS},
    "d is None": (change(d=None), ["param_groups[0]", "d = None"]),
    "d_max is text": (change(d_max="text"), ["param_groups[0]", "d_max", "text"]),
    "negative d": (change(d=-1.0), ["d = -1"]),
    "negative k": (change(k=-3), ["k", "-3"]),
    "bad betas": (change(betas=(0.9, 1.5)), ["betas[1]", "1.5"]),
    "no exp_avg": (lambda saved: saved["state"][2].pop("exp_avg"), ["parameter 2", "()", "exp_avg"]),
    "no s": (lambda saved: saved["state"][3].pop("s"), ["parameter 3", "(2, 3, 2, 2)", "'s'"]),
    "short s": (put(0, "s", torch.zeros(11)), ["parameter 0", "(4, 3)", "'s'", "(11,)"]),
    "long p0": (put(1, "p0", torch.zeros(8)), ["parameter 1", "(7,)", "'p0'", "(8,)"]),
    "other exp_avg_sq": (put(3, "exp_avg_sq", torch.zeros(2, 3, 4)), ["parameter 3", "exp_avg_sq", "(2, 3,"]),
    "transposed exp_avg": (put(0, "exp_avg", torch.zeros(3, 4)), ["parameter 0", "exp_avg", "(3, 4)"]),
    "state of text": (put(0, "exp_avg", "text"), ["parameter 0", "exp_avg", "text"]),
}


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("steps", [0, 3], ids=["new", "running"])
def test_corrupt_checkpoints_change_nothing(name, steps):
    corrupt, words = CORRUPT[name]
    saver, opt = make(), make()
    train(saver, steps=3)
    saved = copy.deepcopy(saver.state_dict())
    corrupt(saved)
    train(opt, steps=steps)
    with refused(opt, ValueError, *words):
        opt.load_state_dict(saved)
    train(opt, steps=1, start=steps)


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_another_optimizers_checkpoint_names_what_it_lacks(other):
    foreign, opt = other(make_params(), lr=1e-3), make()
    train(foreign, steps=2)
    with refused(opt, ValueError, "'d0'", "'d_numerator'", "'slice_p'"):
        opt.load_state_dict(foreign.state_dict())


def test_a_poisoned_run_of_prodigyopt_is_refused():
    """One NaN gradient makes its d_numerator NaN for ever: continuing would only look like training."""
    opt, theirs = twins()
    train(theirs, steps=2)
    parameters(theirs)[0].grad.fill_(NAN)
    theirs.step()
    with refused(opt, ValueError, "param_groups[0]", "nan"):
        opt.load_state_dict(theirs.state_dict())
