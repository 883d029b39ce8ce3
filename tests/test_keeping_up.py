"""Plans that keep up with what is done to their tensors between steps: new addresses, and first gradients."""

import gc
import weakref

import pytest
import torch
from toolbox import device_of, feed, make, make_params, parameters, refused, snapshot, train
from torch import nn

from prodigy_fused import plans
from prodigy_fused.backends import gpu, native, tensor_list

COMPILED = [name for name in ("cpu", "emulated", "triton") if device_of(name) == "cpu"]
needs_cpp = pytest.mark.skipif(bool(native.MISSING), reason="no compiled module")


def first_plan(opt):
    return opt._runtime.plans.plans[0].plan


def swap_parameters(opt):
    for p in parameters(opt):
        p.data = p.data.clone(memory_format=torch.preserve_format)


def swap_states(opt):
    for state in opt.state.values():
        state.update({key: t.clone(memory_format=torch.preserve_format) for key, t in state.items() if key != "step"})


def move_states(opt):
    for state in opt.state.values():
        for key in state.keys() - {"step"}:
            state[key].data = state[key].data.clone(memory_format=torch.preserve_format)


def freed(t):
    t.untyped_storage().resize_(0)
    return t


def bits(opt):
    found = snapshot(opt)
    return found["params"], found["state"], [group["d"] for group in opt.param_groups]


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [swap_parameters, swap_states, move_states])
def test_new_addresses_are_mended_into_the_plans(backend, swap):
    """As an average that is swapped in and out, or offloading, brings them, in some steps or in each."""
    still, moved = make(backend, weight_decay=0.1), make(backend, weight_decay=0.1)
    train(still, moved, steps=3)
    plan, old = first_plan(moved), []
    for t in range(3, 9):
        if t != 5:
            old += [[p.detach() for p in parameters(moved)], [dict(state) for state in moved.state.values()]]
            swap(moved)
        before = [frozen.clone() for group in old[::2] for frozen in group]
        train(still, moved, steps=1, start=t)
        if swap is swap_parameters:  # what is no more the parameter is left alone
            assert all(map(torch.equal, before, [frozen for group in old[::2] for frozen in group]))
    assert bits(still) == bits(moved)
    if backend.one_pass:
        assert first_plan(moved) is plan


@pytest.mark.parametrize("key", ["exp_avg", "step"])
@pytest.mark.parametrize("backend", COMPILED)
def test_state_that_was_taken_away_is_there_again(backend, key):
    opt = make(backend)
    train(opt, steps=2)
    states = [opt.state[p] for p in parameters(opt)]
    for state in states:
        del state[key]
    train(opt, steps=2, start=2)
    assert all(key in state for state in states)


def test_dictionaries_of_the_state_may_be_replaced(backend):
    """By others with tensors that are other ones, or not at all: a parameter then starts again."""
    opt, twin = make(backend), make(backend)
    train(opt, twin, steps=3)
    p = parameters(opt)[1]
    opt.state[p] = {key: t.clone() if key != "step" else t for key, t in opt.state[p].items()}
    train(opt, twin, steps=2, start=3)
    assert bits(opt) == bits(twin)
    del opt.state[p]
    train(opt, steps=1, start=5)
    assert [opt.state[q]["step"] for q in parameters(opt)] == [6, 1, 6, 6]


@pytest.mark.parametrize("backend", COMPILED)
def test_what_cannot_be_mended_is_built_anew(backend):
    opt, twin = make(backend, make_params(torch.float32)), make("reference", make_params(torch.float32))
    train(opt, twin, steps=3)
    changes = [
        lambda p: p.data.t().contiguous().t(),  # another memory order
        lambda p: p.data.double(),
        lambda p: p.data.float().contiguous(),
    ]
    for t, change in enumerate(changes, start=3):
        plan = first_plan(opt)
        for o in (opt, twin):
            p = parameters(o)[0]
            p.grad, p.data = None, change(p)
        train(opt, twin, steps=1, start=t)
        assert first_plan(opt) is not plan
        assert torch.allclose(parameters(opt)[0], parameters(twin)[0], rtol=1e-5)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("move", "words"),
    [
        (lambda p, q: q.data.view(-1)[:3], ["share memory"]),
        (lambda p, q: torch._neg_view(p.data.clone()), ["negated"]),
        (lambda p, q: freed(p.data.clone()), ["no memory"]),
    ],
    ids=["shared", "negated", "freed"],
)
def test_a_new_address_is_checked_before_anything_is_written(backend, move, words):
    shapes = ((4, 3), (7,), (3,))
    opt = make(backend, make_params(shapes=shapes))
    train(opt, steps=3)
    p, q = parameters(opt)[2], parameters(opt)[0]
    right = p.data
    feed(opt, 3)
    p.data = move(p, q)
    for _ in range(2):  # it is not forgotten that this was wrong
        with pytest.raises(ValueError) as caught:
            opt.step()
        assert all(word in str(caught.value) for word in ["parameter 2", *words])
    p.data = right
    opt.step()
    alone = make(backend, make_params(shapes=shapes))
    train(alone, steps=4)
    assert bits(opt) == bits(alone)


CHANGES = {
    "another storage": lambda t: setattr(t, "data", t.data.clone()),
    "another type": lambda t: setattr(t, "data", t.data.view(torch.bfloat16).as_strided((3, 3), (3, 1))),
    "freed": freed,
    "an offset": lambda t: t.set_(t.untyped_storage(), 1, (2, 2), (3, 1)),
    "strides": lambda t: setattr(t, "data", t.data.t()),
    "a shape": lambda t: setattr(t, "data", t.data.view(9)),
    "grown": lambda t: t.untyped_storage().resize_(1 << 16),
    "swapped": lambda t: torch.utils.swap_tensors(t, type(t)(t.detach().clone())),
    "cloned, at first without a copy": lambda t: setattr(t, "its_clone", torch._lazy_clone(t)),
}


@needs_cpp
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("which", ["param", "exp_avg", "p0"])
@pytest.mark.parametrize("trusted", [True, False])
def test_every_change_of_a_tensor_is_noticed(change, which, trusted):
    """With the images that a list has taken by then, and without."""
    native._C.trust_images(trusted)
    try:
        opt = make("reference", make_params(torch.float32, shapes=((3, 3),) * 4))
        train(opt, steps=1)
        slots = opt._runtime.plans.slots
        tensors = native._C.TensorList(slots, torch.Tensor, "float32", 1)
        assert all(tensors.unchanged() for _ in range(3))
        slots[1].state["step"] += 1  # of no concern
        train(opt, steps=1)
        assert tensors.unchanged()
        with torch.no_grad():
            change(slots[2].param if which == "param" else slots[2].state[which])
        assert not tensors.unchanged()
        del slots[2].state["exp_avg_sq"]
        assert not tensors.mend()
    finally:
        native._C.trust_images(True)


@needs_cpp
def test_another_entry_in_the_dictionary_of_the_state_is_of_no_concern():
    opt = make("reference")
    train(opt, steps=1)
    slots = opt._runtime.plans.slots
    tensors = native._C.TensorList(slots, torch.Tensor, "float64", 1)
    assert tensors.unchanged() and tensors.unchanged()
    slots[0].state["note"] = "mine"
    assert tensors.unchanged() and tensors.unchanged()
    slots[0].state["s"] = slots[0].state.pop("s").clone()  # in another place, and another tensor
    assert not tensors.unchanged()
    assert tensors.mend() and tensors.unchanged()


@needs_cpp
def test_images_are_not_trusted_where_a_change_does_not_show():
    assert native.images_are_right(native._C.image_shows)
    for nth in range(1, 13):
        calls = []

        def forgetful(tensor, tensor_class, change, nth=nth, calls=calls):
            calls.append(change)
            shown = native._C.image_shows(tensor, tensor_class, change)
            return not shown if len(calls) == nth else shown

        assert not native.images_are_right(forgetful) and len(calls) == nth
    assert not native.images_are_right(lambda *arguments: 1 / 0)


# -- first gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"split_groups": True, "slice_p": 2}], ids=["one estimate", "split"])
def test_a_plan_that_was_extended_is_one_built_at_once(backend, options):
    """Bit by bit: parameters wake up in another order than they are in, between those that are awake."""
    shapes = [(5,), (3, 2), (7,), (), (4,), (6,)]

    def groups():
        params = make_params(device=backend.device, shapes=shapes)
        return [{"params": params[:3]}, {"params": params[3:], "lr": 0.5}]

    late = make(backend, groups(), **options)
    for t, asleep in enumerate([(0, 1, 3, 4), (0, 3, 4), (0, 3), (3,), ()]):
        feed(late, t, without=asleep)
        before = set(late.state)
        late.step()
        assert set(late.state) == {p for i, p in enumerate(parameters(late)) if i not in asleep} >= before
    plan = first_plan(late)
    at_once = make(backend, groups(), **options)
    at_once.load_state_dict(late.state_dict())
    for p, q in zip(parameters(at_once), parameters(late), strict=True):
        p.data.copy_(q.data)
    train(late, at_once, steps=3, start=5)
    assert bits(late) == bits(at_once)
    assert first_plan(late) is plan
    assert late.param_groups[0]["d"] > 1e-3


def test_a_bad_gradient_beside_a_first_one_changes_nothing(backend):
    opt = make(backend)
    feed(opt, 0, without=(2,))
    opt.step()
    feed(opt, 1)
    good = parameters(opt)[0].grad
    parameters(opt)[0].grad = good.to_sparse()
    with refused(opt, RuntimeError, "parameter 0", "sparse"):
        opt.step()
    parameters(opt)[0].grad = good
    opt.step()
    assert len(opt.state) == 4


@pytest.mark.parametrize("backend", COMPILED)
def test_only_what_is_new_is_read(backend, monkeypatch):
    """So that n first gradients in n steps take time in proportion to n: no plan is built again, no state looked at."""
    built, created = [], []
    for module, name, calls in ((plans.backends, "choose", built), (plans.state, "create", created)):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, c=calls: c.append(1) or f(*a))
    opt = make(backend, make_params(shapes=[(3,)] * 8))
    built.clear()  # those of the constructor
    for t in range(8):
        feed(opt, t, without=tuple(range(t + 1, 8)))
        opt.step()
    assert len(built) == len(created) == 8


# -- loops in C++ and in Python ----------------------------------------------------------------------------------------


def by_hand(monkeypatch, function, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(native, "MISSING", "for the test")
        return function(*arguments)


@needs_cpp
def test_what_a_step_asks_of_all_tensors(monkeypatch):
    params = make_params()
    feed(make(params=params), 0, without=(1,))
    in_cpp, in_python = [None] * 4, [None] * 4
    assert native.read_gradients(params, in_cpp) == by_hand(monkeypatch, native.read_gradients, params, in_python) == 1
    for grads in (in_cpp, in_python):
        assert all(g is p.grad for g, p in zip(grads, params, strict=True))
    native.clear(in_cpp)
    by_hand(monkeypatch, native.clear, in_python)
    assert in_cpp == in_python == [None] * 4
    for indices in ([0, 1, 2, 3], [3, 1], []):
        found = native.with_gradients(params, indices)
        assert found == by_hand(monkeypatch, native.with_gradients, params, indices) == [i for i in indices if i != 1]
    states = [{"step": 300}, {"step": 300}, {"step": 7}, {"step": torch.ones(())}]
    native.count_steps(states)
    by_hand(monkeypatch, native.count_steps, states)
    assert [state["step"] for state in states] == [302, 302, 9, 3]
    for count in (native.count_steps, lambda s: by_hand(monkeypatch, native.count_steps, s)):
        taken_away = [{}]
        count(taken_away)
        assert taken_away == [{"step": 1}]
    for other, expected in ((list(params), True), (params[:3], False), ([*params[:3], nn.Parameter(params[3])], False)):
        for now in (params, tuple(params)):
            found = native.same_objects(now, other), by_hand(monkeypatch, native.same_objects, now, other)
            assert found == (expected, expected)
    entries = dict(zip(params, states, strict=True))
    twin = dict(states[2])
    for keys, values, expected in (
        (params, states, True),
        (params[:3], states[:3], False),
        (params[:3], states, False),
        (params[::-1], states[::-1], False),
        (params, [*states[:2], twin, states[3]], False),
        ([*params[:3], nn.Parameter(params[3])], states, False),
    ):
        found = native.same_entries(entries, keys, values)
        assert found == by_hand(monkeypatch, native.same_entries, entries, keys, values) == expected


@needs_cpp
def test_lists_of_tensors_in_python_keep_up_as_those_in_cpp_do():
    opt = make("reference", make_params(torch.float32))
    train(opt, steps=1)
    slots = opt._runtime.plans.slots[:3]
    lists = [kind(slots[1:2], torch.Tensor, "float32", 1) for kind in (tensor_list.TensorList, native._C.TensorList)]

    def agree(grads):
        assert [tensors.load_gradients(grads) for tensors in lists] == [-1, -1]
        assert lists[0].gradient_words() == lists[1].gradient_words() != b""
        assert [tensors.unchanged() for tensors in lists] == [True, True]

    for tensors in lists:
        tensors.extend(slots)
    agree([slot.param.grad for slot in slots])
    swap_parameters(opt)
    swap_states(opt)
    assert [(tensors.unchanged(), tensors.mend()) for tensors in lists] == [(False, True)] * 2
    agree([slot.param.grad for slot in slots])
    slots[2].param.untyped_storage().resize_(0)
    assert [tensors.mend() for tensors in lists] == [False, False]


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[name for name in COMPILED if name != "cpu"])
def kernels(request):
    return request.param


def test_captures_in_a_row_allocate_no_pinned_memory(kernels, monkeypatch):
    opt = make(kernels, capturable=True)
    train(opt, steps=2)
    pinned, original = [], gpu.GpuPlan._pinned
    monkeypatch.setattr(gpu.GpuPlan, "_pinned", lambda *arguments: pinned.append(1) or original(*arguments))
    for start in (2, 2 + gpu.SPARES):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "capturing", lambda device: True)
            train(opt, steps=gpu.SPARES, start=start)
        assert pinned == []
        train(opt, steps=1)  # not captured: allocates for the next ones
        assert len(pinned) == 2  # and for its own gradients
        pinned.clear()


def overlap(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("event", ["swapped", "first gradient", "option", "group", "loaded"])
def test_what_a_graph_reads_outlives_the_plan(kernels, monkeypatch, event):
    opt = make(kernels, capturable=True)
    feed(opt, 0, without=(2,))
    opt.step()
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "capturing", lambda device: True)
        opt.step()
    plan = first_plan(opt)
    tables = [*plan.captured, *(t for kept in plan.captured if isinstance(kept, dict) for t in kept.values())]
    tables = [t for t in tables if isinstance(t, torch.Tensor)]
    seen = [weakref.ref(t) for t in tables]
    # Tables, and the words that replays copy to the step's table.
    constant = [t for t in tables if t.dtype in (torch.uint8, torch.int64) and not overlap(t, plan._step_table)]
    constant = [(weakref.ref(t), t.clone()) for t in constant]
    assert len(constant) >= 2
    step = weakref.ref(plan._keep_alive)
    del plan, tables
    gc.collect()
    if event == "swapped":
        swap_parameters(opt)
    elif event == "option":
        opt.param_groups[0]["state_dtype"] = None
    elif event == "group":
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    elif event == "loaded":
        opt.load_state_dict(opt.state_dict())
    feed(opt, 1, without=() if event == "first gradient" else (2,))
    opt.step()
    opt.step()
    gc.collect()
    assert all(ref() is not None for ref in seen) and step() is not None
    assert all(torch.equal(ref(), content) for ref, content in constant)


def test_a_capture_has_nothing_to_mend(kernels, monkeypatch):
    opt = make(kernels, capturable=True)
    train(opt, steps=2)
    swap_parameters(opt)
    feed(opt, 2)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "capturing", lambda device: True)
        with refused(opt, RuntimeError, "take one before the capture"):
            opt.step()
    opt.step()
    assert opt.step_count == 3
