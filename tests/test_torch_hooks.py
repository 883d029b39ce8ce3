"""What torch's own tests ask of every optimizer: the hooks of a state dictionary and of a step."""

import copy

import pytest
from toolbox import frozen
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_inputs import each_case, each_implementation, run, started, twin

# -- hooks of a state dictionary -----------------------------------------------------------------------------------


def remember(opt):
    opt.state["test"] = 1


def forget(opt, saved):
    saved["remembered"] = saved["state"].pop("test", None) is not None
    return saved


@each_implementation
def test_state_dict_pre_hook(impl):
    opt, _ = started("default", impl)
    opt.register_state_dict_pre_hook(remember)
    assert opt.state_dict()["state"]["test"] == 1


@each_case
def test_state_dict_post_hook(impl, desc):
    opt, _ = started(desc, impl)
    handle = opt.register_state_dict_post_hook(forget)
    assert opt.state_dict()["remembered"] is False
    handle.remove()
    assert "remembered" not in opt.state_dict()


@each_implementation
def test_state_dict_pre_and_post_hook(impl):
    opt, _ = started("default", impl)
    opt.register_state_dict_pre_hook(remember)
    opt.register_state_dict_post_hook(forget)
    saved = opt.state_dict()
    assert "test" not in saved["state"]
    assert saved["remembered"] is True


@pytest.mark.parametrize("kind", ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"])
def test_order_of_hooks(kind):
    opt, _ = started("default")
    calls = []
    register = getattr(opt, f"register_{kind}_hook")
    register(lambda *_: calls.append("first"))
    register(lambda *_: calls.append("second"))
    register(lambda *_: calls.append("prepended"), prepend=True)
    saved = opt.state_dict()
    if kind.startswith("load"):
        opt.load_state_dict(saved)
    assert calls == ["prepended", "first", "second"]


@each_implementation
def test_load_state_dict_pre_hooks(impl):
    """One that changes the dictionary, one that returns another; that which runs last wins."""

    def change(opt, saved):
        saved["param_groups"][0]["lr"] = 0.25

    def replace(opt, saved):
        mine = copy.deepcopy(saved)
        mine["param_groups"][0]["lr"] = 0.125
        return mine

    opt, closure = started("default", impl)
    opt.register_load_state_dict_pre_hook(change)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.25
    handle = opt.register_load_state_dict_pre_hook(replace, prepend=True)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.25
    handle.remove()
    opt.register_load_state_dict_pre_hook(replace)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.125
    run((opt, closure), steps=1)


@each_case
def test_load_state_dict_post_hook(impl, desc):
    """It sees the optimizer with all that was loaded."""
    opt, _ = started(desc, impl)
    again, closure = twin(opt, desc, impl)
    seen = []
    again.register_load_state_dict_post_hook(lambda o: seen.append((o, frozen(o.state_dict()))))
    again.load_state_dict(opt.state_dict())
    assert seen == [(again, frozen(opt.state_dict()))]
    run((again, closure), steps=1)


# -- hooks of a step -----------------------------------------------------------------------------------------------


@each_case
def test_step_hooks(impl, desc):
    opt, closure = started(desc, impl)
    calls = []

    def note(name):
        return lambda o, args, kwargs: calls.append((name, o is opt))

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
        opt.register_step_pre_hook(note("before")),
        opt.register_step_post_hook(note("after")),
    ]
    other, its_closure = started(desc, impl, steps=0)
    expected = [("global before", True), ("before", True), ("after", True), ("global after", True)]
    try:
        run((opt, closure), steps=2)
        assert calls == 2 * expected
        run((other, its_closure), steps=1)
        assert calls == [*2 * expected, ("global before", False), ("global after", False)]
    finally:
        for handle in handles:
            handle.remove()
    run((opt, closure), steps=1)
    assert len(calls) == 10


def test_a_pre_hook_may_replace_the_closure():
    opt, closure = started("default")
    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert opt.step().item() > 0
    assert opt.step_count == 4
