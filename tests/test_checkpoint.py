"""Saved and loaded: with prodigyopt in both directions, across backends and dtypes, and what is refused."""

import copy
import io
import json
import pickle

import prodigyopt
import pytest
import torch
from toolbox import (
    D0,
    NAMES,
    NHWC,
    ZERO,
    agree,
    device_of,
    each_compiled,
    frozen,
    make,
    make_params,
    parameters,
    refused,
    snapshot,
    train,
    twins,
)
from torch import nn

from prodigy_fused import Prodigy
from prodigy_fused.options import OPTIONS as TABLE

HALF, REST = 5, 6
NUMBERS = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")


def same_params(opt):
    """Copies of the parameters, in the same memory order."""
    return [nn.Parameter(p.detach().clone()) for p in parameters(opt)]


def ours_from(opt, backend=None, **options):
    again = make(backend, same_params(opt), **options)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    return again


def theirs_from(opt, **options):
    again = prodigyopt.Prodigy(same_params(opt), **{"d0": D0, **options})
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    return again


def trained(backend=None, **options):
    opt = make(backend, **options)
    train(opt, steps=HALF)
    return opt


# -- prodigyopt, both ways -----------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"slice_p": 2},
    {"slice_p": 11, "betas": (0.0, 0.99)},
    {"betas": (0.0, 0.999), "weight_decay": 0.1},
    {"use_bias_correction": True, "safeguard_warmup": True, "lr": 0.5, "beta3": 0.98, "d_coef": 30.0},
    {"weight_decay": 0.1, "decouple": False, "growth_rate": 1.02, "d_coef": 2.0, "slice_p": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("continued_by", [theirs_from, ours_from], ids=["prodigyopt", "prodigy_fused"])
def test_a_run_continues_in_the_other_package(backend, options, continued_by):
    ours, uninterrupted = twins(backend, **options)
    train(ours, uninterrupted, steps=HALF)
    if continued_by is theirs_from:
        resumed = theirs_from(ours, **options)
    else:
        resumed = ours_from(uninterrupted, backend, **options)
    train(resumed, uninterrupted, steps=REST, start=HALF)
    agree(resumed, uninterrupted)


def test_a_run_of_prodigyopt_1_0_goes_on(backend):
    """It has no slice_p, and its s and p0 have the parameters' shapes."""
    theirs = twins(backend)[1]
    train(theirs, steps=HALF)
    saved = copy.deepcopy(theirs.state_dict())
    for group in saved["param_groups"]:
        del group["slice_p"]
    for state, p in zip(saved["state"].values(), parameters(theirs), strict=True):
        state |= {key: state[key].view_as(p) for key in ("s", "p0") if state[key].dim() == 1}
    ours = twins(backend)[0]
    with torch.no_grad():
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            p.copy_(q)
    ours.load_state_dict(saved)
    train(ours, theirs, steps=REST, start=HALF)
    agree(ours, theirs)


class AsUnderRun(pickle.Unpickler):
    """Finds our class where prodigyopt's was pickled, as ``python -m prodigy_fused run`` does."""

    def find_class(self, module, name):
        return Prodigy if name == "Prodigy" else super().find_class(module, name)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_optimizer_that_prodigyopt_pickled_goes_on(options):
    theirs = twins(**options)[1]
    train(theirs, steps=HALF)
    ours = AsUnderRun(io.BytesIO(pickle.dumps(theirs))).load()
    train(ours, theirs, steps=REST, start=HALF)
    assert type(ours) is Prodigy
    agree(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS)
def test_before_the_first_step(options):
    """Nothing but numbers yet; prodigyopt has no d_hat and d_denom then."""
    ours, theirs = twins(**options)
    swapped = ours_from(theirs, **options), theirs_from(ours, **options)
    assert (swapped[0].nonfinite_steps, swapped[0].corrections) == (0, 0)
    train(ours, theirs, *swapped)
    agree(swapped[0], theirs)
    agree(swapped[1], theirs)


def test_format_is_that_of_prodigyopt(backend):
    ours, theirs = twins(backend, slice_p=2)
    train(ours, theirs, steps=HALF)
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert wanted["param_groups"][0].keys() <= mine["param_groups"][0].keys()
    for i, state in wanted["state"].items():
        assert state.keys() == mine["state"][i].keys()
        assert [v.shape for v in state.values() if torch.is_tensor(v)] == [
            mine["state"][i][key].shape for key, v in state.items() if torch.is_tensor(v)
        ]
        assert mine["state"][i]["step"] == state["step"]
    assert mine["state"][ZERO]["p0"].dim() == 0
    for group in mine["param_groups"]:
        assert all(type(group[name]) in (int, float) for name in NUMBERS)
        assert json.loads(json.dumps({name: group[name] for name in NUMBERS}))["k"] == HALF


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_channels_last_is_saved_in_row_major_order(options):
    params = make_params()
    for p in params:
        p.data = p.data.contiguous()
    contiguous, mixed = make(None, params, **options), make(None, **options)
    train(contiguous, mixed, steps=HALF)
    assert not parameters(mixed)[NHWC].is_contiguous()
    saved = [opt.state_dict()["state"].values() for opt in (contiguous, mixed)]
    for a, b in zip(*saved, strict=True):
        assert all(torch.allclose(torch.as_tensor(a[key]), torch.as_tensor(b[key]), rtol=1e-12) for key in a)


# -- options of ours alone -----------------------------------------------------------------------------------

# Sets of options that prodigyopt lacks; together they have all that a checkpoint carries. Two groups each.
OWN_OPTIONS = {
    "maximize": {"maximize": True},
    "state in bfloat16": {"state_dtype": "bfloat16"},
    "state in the parameters' dtype": {"state_dtype": None, "slice_p": 2},
    "state in 8 bits": {"state_dtype": "8bit", "min_8bit_size": 1},
    "displacement": {"low_precision": "displacement"},
    "d_limit": {"d_limit": 1.5 * D0},
    "split_groups": {"split_groups": True, "slice_p": 2},
    "frozen": {"prodigy_steps": HALF - 2},
    "frozen later": {"prodigy_steps": HALF + 2, "split_groups": True},
    "frozen displacement": {"prodigy_steps": HALF - 2, "low_precision": "displacement"},
}
each_own = pytest.mark.parametrize("options", OWN_OPTIONS.values(), ids=OWN_OPTIONS.keys())


def test_every_option_that_a_checkpoint_carries_is_among_them():
    carried = {name for name, option in TABLE.items() if option.role != "machine" and not option.in_reference}
    assert carried == set().union(*OWN_OPTIONS.values()) - {"slice_p"}


def two_groups(params):
    half = len(params) // 2
    return [{"params": params[:half]}, {"params": params[half:]}]


def state_dtypes(opt):
    return [{key: getattr(v, "dtype", None) for key, v in opt.state[p].items()} for p in parameters(opt)]


@each_own
def test_a_run_with_own_options_continues(backend, options):
    """Bit by bit, in an optimizer that was constructed without them: they are the checkpoint's."""
    device, dtypes = device_of(backend), (torch.float32, torch.bfloat16)
    params, copies = ([p for dtype in dtypes for p in make_params(dtype, device)] for _ in range(2))
    opt = make(backend, two_groups(params), **options)
    train(opt, steps=HALF)
    for p, q in zip(copies, params, strict=True):
        p.data.copy_(q)
    resumed = make(backend, two_groups(copies), slice_p=options.get("slice_p", 1))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, resumed, steps=REST, start=HALF)
    assert snapshot(resumed)["params"] == snapshot(opt)["params"]
    assert frozen(resumed.state_dict()) == frozen(opt.state_dict())
    assert state_dtypes(resumed) == state_dtypes(opt)
    assert opt.param_groups[0]["d"] > D0


@each_own
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_own_options_with_a_checkpoint_of_prodigyopt(backend, options, dtype):
    """They stay as constructed; in float64 the numbers are those of the reference backend."""
    theirs = prodigyopt.Prodigy(
        two_groups(make_params(dtype, device_of(backend))), d0=D0, slice_p=options.get("slice_p", 1)
    )
    train(theirs, steps=HALF)
    saved = copy.deepcopy(theirs.state_dict())
    opts = [make(name, two_groups(same_params(theirs)), **options) for name in (backend, "reference")]
    for opt in opts:
        opt.load_state_dict(saved)
        assert {name: opt.param_groups[1][name] for name in options} == options
    fresh = make(backend, two_groups(same_params(theirs)), **options)
    train(fresh, steps=HALF)
    train(*opts, fresh, steps=REST, start=HALF)
    assert state_dtypes(opts[0]) == state_dtypes(fresh)
    assert all(p.isfinite().all() for p in parameters(opts[0]))
    if dtype == torch.float64:
        agree(*opts)


# -- files, copies -------------------------------------------------------------------------------------------


def through_a_file(opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = make(opt.defaults["backend"], same_params(opt))
    again.load_state_dict(torch.load(file, weights_only=True))
    return again


COPIES = {
    "torch.save": through_a_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_continue(backend, way):
    opt = trained(backend)
    again = COPIES[way](opt)
    before = snapshot(opt)
    train(again, steps=REST, start=HALF)
    assert snapshot(opt) == before, "the copy shares memory with the original"
    train(opt, steps=REST, start=HALF)
    agree(again, opt, rtol=0.0)


def test_an_optimizer_that_an_older_version_pickled(backend):
    """It lacks the options and the numbers that came later."""
    opt = trained(backend)
    older = pickle.loads(pickle.dumps(opt))
    lacking = [name for name, option in TABLE.items() if not option.in_reference and name not in ("fused", "backend")]
    for known in (older.defaults, *older.param_groups):
        for name in (*lacking, "d_hat", "corrections", "frozen"):
            known.pop(name, None)
    again = pickle.loads(pickle.dumps(older))
    train(again, opt, steps=REST, start=HALF)
    agree(again, opt, rtol=0.0)
    again.add_param_group({"params": [nn.Parameter(torch.ones_like(parameters(opt)[0]))]})


def test_deepcopy_with_its_model():
    model = nn.Linear(3, 2).double()
    twin, opt = copy.deepcopy((model, make(None, model.parameters())))
    assert list(map(id, parameters(opt))) == list(map(id, twin.parameters()))
    train(opt, steps=2)


@each_compiled
def test_a_copy_still_takes_scaled_gradients(backend):
    opt = make(None, fused=True)
    assert COPIES["deepcopy"](opt)._step_supports_amp_scaling
    assert COPIES["pickle"](opt)._step_supports_amp_scaling


@pytest.mark.parametrize("slice_p", [1, 2])
def test_loading_does_not_alias_the_checkpoint(backend, slice_p):
    opt = trained(backend, slice_p=slice_p)
    checkpoint = copy.deepcopy(opt.state_dict())
    before = frozen(checkpoint)
    again = make(backend, same_params(opt), slice_p=slice_p)
    again.load_state_dict(checkpoint)
    assert frozen(checkpoint) == before
    train(again, steps=2, start=HALF)
    assert frozen(checkpoint) == before


# -- other backends, other dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", NAMES)
@pytest.mark.parametrize("loaded_by", NAMES)
def test_across_backends(saved_by, loaded_by):
    opt = trained(saved_by)
    again = make(loaded_by)
    for p, q in zip(parameters(again), parameters(opt), strict=True):
        p.data.copy_(q)
    again.load_state_dict(opt.state_dict())
    train(opt, again, steps=REST, start=HALF)
    agree(again, opt)
    assert again.param_groups[0]["backend"] == loaded_by


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_is_never_cast_to_the_parameters_dtype(dtype):
    opt = make(None, make_params(dtype))
    train(opt, steps=HALF)
    again = ours_from(opt)
    wide = torch.promote_types(dtype, torch.float32)
    for p, q in zip(parameters(again), parameters(opt), strict=True):
        assert frozen(again.state[p]) == frozen(opt.state[q])
        assert {again.state[p][key].dtype for key in ("s", "exp_avg", "exp_avg_sq")} == {wide}
        assert again.state[p]["p0"].dtype == dtype
    train(opt, again, steps=3, start=HALF)
    assert snapshot(again)["params"] == snapshot(opt)["params"]


def test_a_low_precision_checkpoint_of_prodigyopt_is_widened():
    theirs = prodigyopt.Prodigy(make_params(torch.bfloat16), d0=D0)
    train(theirs, steps=HALF)
    again = ours_from(theirs)
    p, q = parameters(again)[0], parameters(theirs)[0]
    assert again.state[p]["s"].dtype == torch.float32
    assert torch.equal(again.state[p]["s"], theirs.state[q]["s"].float().view_as(p))
    train(again, steps=1, start=HALF)


def test_a_float32_checkpoint_continues_in_float64():
    opt = make(None, make_params(torch.float32))
    train(opt, steps=HALF)
    wide = Prodigy([nn.Parameter(p.detach().double()) for p in parameters(opt)])
    wide.load_state_dict(opt.state_dict())
    train(opt, wide, steps=REST, start=HALF)
    tensors = [v for state in wide.state.values() for v in state.values() if torch.is_tensor(v)]
    assert {v.dtype for v in tensors} == {torch.float64}
    agree(wide, opt, rtol=1e-5)


def test_how_a_step_is_computed_stays_as_constructed():
    saved = trained("reference").state_dict()
    assert saved["param_groups"][0]["backend"] == "reference"
    own = {"backend": "foreach", "fused": False, "foreach": True, "capturable": True}
    again = make(**own)
    again.load_state_dict(saved)
    assert {key: again.param_groups[0][key] for key in own} == own


def test_the_state_of_a_parameter_that_is_in_no_group():
    opt = Prodigy([{"params": p} for p in make_params()], d0=D0)
    train(opt, steps=1)
    p = opt.param_groups.pop()["params"][0]
    train(opt, steps=1, start=1)
    with refused(opt, KeyError, "(2, 3, 2, 2)", "delete"):
        opt.state_dict()
    del opt.state[p]
    assert len(opt.state_dict()["state"]) == 3


# -- hooks and tools -----------------------------------------------------------------------------------------


def test_hooks_of_the_user():
    opt, calls = trained(), []
    opt.register_state_dict_pre_hook(lambda o: calls.append("before saving"))
    opt.register_state_dict_post_hook(lambda o, saved: {"wrapped": saved})
    saved = opt.state_dict()
    assert saved["wrapped"]["state"][0]["step"] == HALF, "a post hook sees what would have been returned"

    again = make(None, same_params(opt))
    again.register_load_state_dict_pre_hook(lambda o, saved: saved["wrapped"])
    again.register_load_state_dict_post_hook(lambda o: calls.append(("loaded", o.step_count)))
    again.load_state_dict(saved)
    assert calls == ["before saving", ("loaded", HALF)]
    train(opt, again, steps=2, start=HALF)
    agree(again, opt, rtol=0.0)
