"""torch.distributed.checkpoint: its forms of a state dict, and its files; a run continues from each, bit by bit."""

import copy
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from toolbox import agree, device_of, frozen, make, snapshot, train
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

HALF, REST = 5, 4
# The last two change which tensors the state holds, before and after the checkpoint.
OPTIONS = {
    "plain": {"weight_decay": 0.1},
    "sampled": {"slice_p": 2, "betas": (0.0, 0.99)},
    "split_groups": {"split_groups": True},
    "frozen": {"prodigy_steps": HALF - 1},
    "frozen later": {"prodigy_steps": HALF + 1},
}
FORMS = {
    "nested": {},
    "full": {"full_state_dict": True},
    "on the CPU": {"cpu_offload": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
}


def net(backend):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device_of(backend), torch.float64)


def optimizer(backend, model, **options):
    return make(backend, [{"params": list(layer.parameters())} for layer in model], **options)


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_run_continues(backend, options, form, flat):
    first, second = net(backend), net(backend)
    opt, resumed = (optimizer(backend, model, **options) for model in (first, second))
    train(opt, steps=HALF)
    if flat and options.get("prodigy_steps", HALF) < HALF and torch.__version__ < "2.11":
        pytest.skip("torch 2.6 cannot load a flat state without s and p0, which a new optimizer has")
    how = StateDictOptions(**form, flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(first, opt, options=how))
    assert ("state.0.weight.exp_avg_sq" if flat else "state") in saved
    second.load_state_dict(first.state_dict())
    # torch itself cannot load what is both, not even AdamW's.
    there = {**form, "full_state_dict": form.get("full_state_dict", False) and not flat}
    how = StateDictOptions(**there, flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(second, resumed, saved, options=how)
    train(opt, resumed, steps=REST, start=HALF)
    assert snapshot(resumed)["params"] == snapshot(opt)["params"]
    assert frozen(resumed.state_dict()) == frozen(opt.state_dict())
    assert opt.param_groups[0]["d"] > opt.param_groups[0]["d0"]


def test_groups_of_a_flat_state_dict_are_words_and_numbers():
    """Which is why it may be gathered from all ranks."""
    model = net(None)
    opt = optimizer(None, model, state_dtype=torch.bfloat16)
    train(opt, steps=1)
    saved = get_optimizer_state_dict(model, opt, options=StateDictOptions(flatten_optimizer_state_dict=True))
    groups = {key: value for key, value in saved.items() if key.startswith("param_groups.")}
    assert groups["param_groups.0.weight.state_dtype"] == "bfloat16"
    assert json.loads(json.dumps(groups)) == {**groups, **{k: list(v) for k, v in groups.items() if "betas" in k}}


def test_an_optimizer_without_state_is_not_stepped(backend):
    """It materialises state with a step of lr 0 on zero gradients, which must move nothing."""
    model, twin = net(backend), net(backend)
    touched, plain = (make(backend, m.parameters(), weight_decay=0.1) for m in (model, twin))
    before = snapshot(touched)
    get_optimizer_state_dict(model, touched)
    after = snapshot(touched)
    assert (after["params"], after["groups"]) == (before["params"], before["groups"])
    train(touched, plain, steps=HALF)
    agree(touched, plain, rtol=0.0)


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage is deprecated")  # of torch 2.6
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_files(backend, options, tmp_path):
    """Loaded in place, as torch.distributed.checkpoint does; a single process."""
    first, second = net(backend), net(backend)
    opt, resumed = (optimizer(backend, model, **options) for model in (first, second))
    train(opt, steps=HALF)
    names = ("model", "optimizer")
    dcp.save(dict(zip(names, get_state_dict(first, opt), strict=True)), checkpoint_id=tmp_path)
    loaded = dict(zip(names, get_state_dict(second, resumed), strict=True))
    # The file of a frozen estimate lacks s and p0, for which a new optimizer has a place.
    planner = DefaultLoadPlanner(allow_partial_load="prodigy_steps" in options)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner)
    set_state_dict(second, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(opt, resumed, steps=REST, start=HALF)
    assert snapshot(resumed)["params"] == snapshot(opt)["params"]
    assert frozen(resumed.state_dict()) == frozen(opt.state_dict())
