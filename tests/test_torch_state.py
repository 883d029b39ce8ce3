"""What torch's own tests ask of every optimizer: state dictionaries and copies."""

import copy
import io
import pickle

import pytest
import torch
from toolbox import frozen, parameters, snapshot
from torch import nn
from torch_inputs import each_case, each_implementation, kwargs_of, regression, run, started, tensors, twin

from prodigy_fused import Prodigy
from prodigy_fused.options import OPTIONS


def without_names(state_dict):
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return frozen({**state_dict, "param_groups": groups})


# -- state dictionaries --------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_names_do_not_matter_and_stay(impl, named):
    opt, closure = started("weight decay", impl, named=named[0])
    again, its_closure = twin(opt, "weight decay", impl, named=named[1])
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    run((opt, closure), (again, its_closure))
    assert all(map(torch.equal, parameters(opt), parameters(again)))
    assert without_names(opt.state_dict()) == without_names(again.state_dict())
    # As torch does it: the checkpoint's names, else those of the one that loads.
    expected = ["weight", "bias"] if named[0] else ["w", "b"] if named[1] else None
    assert again.state_dict()["param_groups"][0].get("param_names") == expected


@each_case
def test_state_dict_is_deterministic(impl, desc):
    """Equal runs have equal state dictionaries, and a run continues from one."""
    opt, closure = started(desc, impl)
    again, its_closure = twin(opt, desc, impl)
    saved = copy.deepcopy(opt.state_dict())
    before = frozen(saved)
    again.load_state_dict(saved)
    assert frozen(saved) == before
    run((opt, closure), (again, its_closure))
    assert all(map(torch.equal, parameters(opt), parameters(again)))
    assert frozen(opt.state_dict()) == frozen(again.state_dict())
    assert frozen(saved) == before
    # A group given twice is numbered alike.
    again.param_groups.extend(again.param_groups)
    numbered = [group["params"] for group in again.state_dict()["param_groups"]]
    assert numbered == [[0, 1], [0, 1]]


@each_case
def test_save_and_load_with_weights_only(impl, desc):
    opt, closure = started(desc, impl)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert frozen(loaded) == frozen(opt.state_dict())
    again, its_closure = twin(opt, desc, impl)
    again.load_state_dict(loaded)
    run((opt, closure), (again, its_closure))
    assert all(map(torch.equal, parameters(opt), parameters(again)))


@each_case
def test_an_older_state_dict_loads(impl, desc):
    """One without the options that prodigyopt does not have."""
    opt, closure = started(desc, impl)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for name, option in OPTIONS.items():
            if not option.in_reference:
                del group[name]
    opt.load_state_dict(saved)
    for name, value in kwargs_of(desc, impl).items():
        if not OPTIONS[name].in_reference:
            assert opt.param_groups[0][name] == value
    run((opt, closure), steps=1)


@each_implementation
@pytest.mark.parametrize("step", [2, 2.0, torch.tensor(2), torch.tensor(2.0)], ids=repr)
def test_a_saved_step_of_any_type(impl, step):
    """Trainers that convert checkpoints write numbers or tensors."""
    opt, closure = started("default", impl)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = step
    opt.load_state_dict(saved)
    run((opt, closure), steps=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@each_case
def test_load_for_parameters_of_another_dtype(impl, desc, dtype):
    opt, _ = started(desc, impl)
    again, closure = twin(opt, desc, impl, dtype)
    saved = copy.deepcopy(opt.state_dict())
    before = frozen(saved)
    again.load_state_dict(saved)
    assert frozen(saved) == before
    assert again.d == opt.d
    run((again, closure), steps=2)
    for p in parameters(again):
        assert p.dtype == again.state[p]["p0"].dtype == dtype
        assert p.isfinite().all()


@each_case
def test_state_is_there_after_a_step(impl, desc):
    opt, _ = started(desc, impl, steps=1)
    assert set(opt.state) == set(parameters(opt))
    assert all(opt.state.values())


# -- copies --------------------------------------------------------------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda opt: pickle.loads(pickle.dumps(opt))}


@each_case
@pytest.mark.parametrize("how", COPIES)
def test_copies(how, impl, desc):
    opt, closure = started(desc, impl)
    copied = COPIES[how](opt)
    assert {name for name in vars(copied) if name[0] != "_"} == {name for name in vars(opt) if name[0] != "_"}
    assert opt.defaults.items() <= copied.defaults.items()  # torch's __setstate__ adds "differentiable"
    before = frozen(opt.state_dict())
    assert frozen(copied.state_dict()) == before
    run((copied, regression(*parameters(copied), copied)))
    assert frozen(opt.state_dict()) == before, "the copy shares memory with the original"
    run((opt, closure))
    assert all(map(torch.equal, parameters(opt), parameters(copied)))
    assert frozen(copied.state_dict()) == frozen(opt.state_dict())


def test_deepcopy_with_its_model():
    model = nn.Linear(5, 6)
    opt = Prodigy(model.parameters())
    twin_model, again = copy.deepcopy((model, opt))
    assert all(p is q for p, q in zip(parameters(again), twin_model.parameters(), strict=True))
    run((again, regression(*parameters(again), again)), steps=1)
    assert again.step_count == 1 and opt.step_count == 0


@each_case
def test_it_can_be_printed(impl, desc):
    opt, _ = started(desc, impl)
    assert repr(opt).startswith("Prodigy (")
    assert f"    lr: {opt.param_groups[0]['lr']}\n" in repr(opt)


@each_implementation
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(impl, set_to_none):
    opt, closure = started("default", impl)
    closure()
    opt.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in parameters(opt)]
    assert all(grad is None if set_to_none else not grad.any() for grad in grads)
    before = snapshot(opt)["params"]
    opt.step()
    assert (snapshot(opt)["params"] == before) == set_to_none  # on the old momentum
    run((opt, closure), steps=1)


def test_tensors_without_requires_grad_are_taken():
    params = tensors()
    opt = Prodigy([p.detach() for p in params], d0=1e-2)
    for p in parameters(opt):
        p.grad = torch.ones_like(p)
    opt.step()
    assert not any(map(torch.equal, params, tensors()))  # detach() shares memory
