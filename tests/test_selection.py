"""Which backend takes a tensor, and that its plan follows the tensor wherever other tools move it."""

import copy
import weakref
from types import SimpleNamespace

import prodigyopt
import pytest
import torch
from toolbox import (
    D0,
    NHWC,
    ON_CPU,
    agree,
    device_of,
    each_compiled,
    feed,
    make,
    make_params,
    parameters,
    refused,
    train,
    twins,
    used,
)
from torch import nn

from prodigy_fused import Prodigy, backends
from prodigy_fused.backends import cpu, cuda

# All parameters here are on the CPU, so these do not ask for a GPU's backends.
BEST = "cpu" if "cpu" in ON_CPU else "foreach"
needs_compiled = pytest.mark.skipif(BEST != "cpu", reason="no compiled backend here")


def step_once(params, **options):
    opt = Prodigy(params, **options)
    feed(opt, 0)
    opt.step()
    return used(opt)


# -- the choice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, BEST),
        ({"foreach": True}, "foreach"),
        ({"foreach": False}, "reference"),
        ({"fused": False}, "foreach"),
        ({"fused": False, "foreach": True}, "foreach"),
        ({"fused": False, "foreach": False}, "reference"),
        ({"backend": "foreach", "fused": False}, "foreach"),
        ({"backend": "reference", "foreach": False}, "reference"),
        pytest.param({"fused": True}, "cpu", marks=needs_compiled),
        pytest.param({"fused": True, "foreach": False}, "cpu", marks=needs_compiled),
        pytest.param({"fused": True, "backend": "cpu"}, "cpu", marks=needs_compiled),
    ],
)
def test_choice_for_float32(options, expected):
    assert step_once(make_params(torch.float32), **options) == {expected}


def test_named_backend_is_the_one_used(backend):
    opt = make(backend)
    train(opt, steps=1)
    assert used(opt) == {backend.name}


def test_every_parameter_gets_the_best_backend_that_can_take_it():
    params = [*make_params(torch.float32), *make_params(torch.bfloat16)]
    assert step_once([*params, with_gaps()]) == {BEST, "foreach"}


@pytest.mark.parametrize(
    ("options", "first", "second", "expected"),
    [
        ({}, {"fused": False}, {"foreach": False}, {"foreach", "reference"}),
        ({"backend": "reference"}, {"fused": False}, {}, {"foreach", "reference"}),
        ({"foreach": True}, {"backend": "reference"}, {}, {"foreach", "reference"}),
        ({"foreach": True}, {"foreach": False}, {}, {"foreach", "reference"}),
        pytest.param({"fused": True}, {"foreach": True}, {}, {"foreach", "cpu"}, marks=needs_compiled),
        pytest.param({"foreach": True}, {"fused": True}, {}, {"foreach", "cpu"}, marks=needs_compiled),
    ],
)
def test_groups_choose_for_themselves(options, first, second, expected):
    """A group's own wish wins over that of the optimizer, which it may contradict."""
    groups = [{"params": make_params(), **first}, {"params": make_params(), **second}]
    assert step_once(groups, **options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "nonsense"}, ["backend", "nonsense", "foreach"]),
        ({"fused": True, "foreach": True}, ["fused", "foreach"]),
        ({"fused": True, "backend": "foreach"}, ["fused", "'foreach'"]),
        ({"fused": True, "backend": "reference"}, ["fused", "'reference'"]),
        ({"foreach": True, "backend": "reference"}, ["foreach", "'reference'"]),
        *[({"fused": False, "backend": name}, ["fused", name]) for name in backends.compiled()],
        *[({"foreach": True, "backend": name}, ["foreach", name]) for name in backends.compiled()],
    ],
)
def test_contradictory_choices(options, words):
    with pytest.raises(ValueError) as caught:
        Prodigy(make_params(), **options)
    assert [word for word in words if word not in str(caught.value)] == []


def with_gaps():
    return nn.Parameter(torch.zeros(4, 6)[:, ::2])


# A parameter of shape (4, 3), or an option of its group, that no compiled backend can take; and words of the message.
REFUSALS = [
    ({"params": with_gaps}, "strides (6, 2)", "contiguous"),
]


@needs_compiled
@pytest.mark.parametrize("options", [{"fused": True}, {"backend": "cpu"}])
@pytest.mark.parametrize(("unfit", "reason", "remedy"), REFUSALS)
def test_what_was_asked_for_never_falls_back(options, unfit, reason, remedy):
    def group():
        return {**unfit, "params": unfit.get("params", lambda: nn.Parameter(torch.ones(4, 3)))()}

    with pytest.raises(RuntimeError) as caught:
        Prodigy([{"params": make_params(torch.float32)}, group()], **options)
    for word in (*map(str, options), "(4, 3)", "cpu: ", reason, remedy):
        assert word in str(caught.value)

    opt = Prodigy(make_params(torch.float32), **options)
    train(opt, steps=2)
    with refused(opt, RuntimeError, reason, remedy):
        opt.add_param_group(group())
    train(opt, steps=1, start=2)


@needs_compiled
def test_a_missing_module_is_a_reason_and_not_a_failure(monkeypatch):
    monkeypatch.setattr(cpu, "MISSING", "the compiled module is missing (test)")
    with pytest.warns(UserWarning, match=r"foreach.*the compiled module is missing \(test\)"):
        assert step_once(make_params()) == {"foreach"}
    assert step_once(make_params()) == {"foreach"}  # said once
    with pytest.raises(RuntimeError, match=r"the compiled module is missing \(test\)"):
        Prodigy(make_params(), fused=True)


@pytest.mark.skipif(cuda.MISSING is not None or cuda._C.CUDA is None, reason="no CUDA half here")
def test_a_gpu_that_this_build_has_no_code_for(monkeypatch):
    """It is a reason, for the message or to fall back, and not an error in the first step."""
    old = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(cuda, "_problem", lambda device: "no kernel image")
    reason = cuda.unsupported(old, {})
    assert "cuda:0 (no kernel image)" in reason
    assert "CMAKE_CUDA_ARCHITECTURES" in reason


@each_compiled
def test_parameters_that_stop_fitting_are_noticed_before_the_step(backend):
    opt = make(backend, make_params(torch.float32, device_of(backend)))
    train(opt, steps=2)
    for p in parameters(opt):
        p.grad = None
        p.data = torch.stack([p.data, p.data], -1)[..., 0]
    feed(opt, 2)
    with refused(opt, RuntimeError, "strides"):
        opt.step()


# -- tensors that move ---------------------------------------------------------------------------------------


def clone_storage(opt):
    for p in parameters(opt):
        p.data = p.data.clone()


def reorder_memory(opt):
    p = parameters(opt)[NHWC]
    nhwc = p.is_contiguous(memory_format=torch.channels_last)
    p.data = p.data.clone(memory_format=torch.contiguous_format if nhwc else torch.channels_last)


def transpose_memory(opt):
    p = parameters(opt)[0]
    p.data = p.data.t().contiguous().t() if p.is_contiguous() else p.data.contiguous()


def offload_state(opt):
    """As offloading tools do: the tensor object stays, its storage goes away and another one comes back."""
    for state in opt.state.values():
        for value in filter(torch.is_tensor, state.values()):
            host = value.data.clone()
            value.data = torch.empty(0, dtype=value.dtype)
            value.data = host


def replace_state_tensors(opt):
    for state in opt.state.values():
        state.update({key: v.clone() if torch.is_tensor(v) else v for key, v in state.items()})


def replace_state_dicts(opt):
    for p in parameters(opt):
        opt.state[p] = copy.deepcopy(opt.state[p])


def replace_state(opt):
    opt.state = copy.copy(opt.state)


def swap_params(opt):
    """As accelerate and FSDP2 do: other objects, which take over the state."""
    for group in opt.param_groups:
        new = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        for p, q in zip(group["params"], new, strict=True):
            if p in opt.state:
                opt.state[q] = opt.state.pop(p)
        group["params"][:] = new  # in place: a cache of the list would not notice


MOVES = [
    clone_storage, reorder_memory, transpose_memory, offload_state, replace_state_tensors,
    replace_state_dicts, replace_state, swap_params,
]  # fmt: skip


@pytest.mark.parametrize("slice_p", [1, 3])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_training_goes_on_when_tensors_move(backend, move, slice_p):
    moved, theirs = twins(backend, slice_p=slice_p)
    train(moved, theirs, steps=3)
    for t in range(3, 9):
        move(moved)
        train(moved, theirs, steps=1, start=t)
    agree(moved, theirs)
    assert set(moved.state) == set(parameters(moved))
    assert used(moved) == {backend.name}


@pytest.mark.parametrize("how", ["clear", "new", "inner"])
def test_cleared_state_starts_afresh(backend, how):
    opts = twins(backend)
    train(*opts, steps=3)
    for opt in opts:
        if how == "clear":
            opt.state.clear()
        elif how == "new":
            opt.state = type(opt.state)(dict)
        else:
            opt.state.pop(parameters(opt)[0])
    starts = [p.detach().clone() for p in parameters(opts[0])]
    train(*opts, start=3)
    agree(*opts)
    x0 = opts[0].state[parameters(opts[0])[0]]["p0"]
    assert torch.equal(x0, starts[0])


@pytest.mark.parametrize("how", ["dict", "tensors", "data"])
def test_state_of_one_among_many_parameters_is_changed(backend, how):
    """Whoever changes a single state (surgery on one layer) must not have to wait until the plan looks at it."""
    device = device_of(backend)
    many = [make_params(device=device, shapes=[(2,)] * 200) for _ in range(2)]
    opts = make(backend, many[0]), prodigyopt.Prodigy(many[1], d0=D0)
    train(*opts, steps=2)
    for t in range(2, 6):
        for opt in opts:
            p = parameters(opt)[(77 * t) % 200]
            zeros = {key: torch.zeros_like(opt.state[p][key]) for key in ("exp_avg", "exp_avg_sq", "s")}
            if how == "dict":
                opt.state[p] = {**opt.state[p], **zeros}
            elif how == "tensors":
                opt.state[p].update(zeros)
            else:
                for key, value in zeros.items():
                    opt.state[p][key].data = value
        train(*opts, steps=1, start=t)
    agree(*opts)


@pytest.mark.parametrize("backend", ON_CPU)
def test_memory_of_replaced_state_is_released_at_once(backend):
    """Offloading frees memory only if the optimizer holds none of what was replaced."""
    opt = make(backend)
    train(opt, steps=2)
    state = opt.state[parameters(opt)[0]]
    memory = state["exp_avg"].numpy().copy()
    alive = weakref.ref(memory)
    state["exp_avg"] = torch.from_numpy(memory)
    del memory
    train(opt, steps=1, start=2)
    assert alive() is not None
    state["exp_avg"] = state["exp_avg"].clone()
    assert alive() is None


def test_swap_before_the_first_step(backend):
    opt, theirs = twins(backend)
    originals = parameters(opt)
    swap_params(opt)
    train(opt, theirs)
    agree(opt, theirs)
    assert all(map(torch.equal, originals, make_params(device=originals[0].device.type)))
    assert not set(map(id, originals)) & set(map(id, opt.state))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_model_made_double_between_steps(backend, swap):
    """As ``module.to`` does it, or does after ``set_swap_module_params_on_conversion(True)``."""
    opt = make(backend, make_params(torch.float32))
    train(opt, steps=4)
    again = Prodigy([nn.Parameter(p.detach().double()) for p in parameters(opt)], d0=D0, backend=backend)
    again.load_state_dict(opt.state_dict())
    opt.zero_grad()
    for p in parameters(opt):
        if swap:
            torch.utils.swap_tensors(p, nn.Parameter(p.detach().double()))
        else:
            p.data = p.data.double()
    train(opt, again, start=4)
    agree(opt, again)
    kept = [state["exp_avg_sq"].dtype for state in opt.state.values()]
    assert kept == [torch.float64] * 4
