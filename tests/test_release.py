"""Gradient release: parameters stepped one by one have the bits of the step that has all gradients at once."""

import copy
import gc
import random
import weakref

import pytest
import torch
from toolbox import D0, feed, frozen, gradient, make_params, parameters, wants_grad_dtype
from torch import nn

import prodigy_fused
from prodigy_fused import Prodigy, release

OPTIONS = {
    "default": {},
    "sampled": {"slice_p": 3, "use_bias_correction": True, "growth_rate": 1.02},
    "no momentum": {"betas": (0.0, 0.99)},
    "coupled decay": {"weight_decay": 0.1, "decouple": False},
    "frozen": {"prodigy_steps": 3},
    "16 bits of state": {"state_dtype": "bfloat16"},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, no momentum": {"dtype": torch.bfloat16, "betas": (0.0, 0.99), "slice_p": 2},
    "displacement": {"dtype": torch.bfloat16, "low_precision": "displacement"},
    "24 bits": {"dtype": torch.bfloat16, "low_precision": "24bit", "slice_p": 3},
    "8 bits": {"state_dtype": "8bit", "min_8bit_size": 1},
    "8 bits, bfloat16": {"state_dtype": "8bit", "min_8bit_size": 1, "dtype": torch.bfloat16, "slice_p": 2},
    "float16": {"dtype": torch.float16, "slice_p": 2},
}
exact = pytest.mark.parametrize("options", OPTIONS)


def pair(backend, dtype=torch.float32, **options):
    """Two equal optimizers."""
    return [backend(make_params(dtype, backend.device), d0=D0, **options) for _ in range(2)]


def by_one(opt, order=None):
    """Steps each parameter that has a gradient, in a random order, frees the gradients, and ends the step."""
    params = parameters(opt)
    for p in order or random.sample(params, len(params)):
        opt.step_parameter(p)
        p.grad = None
    opt.step()


def same(backend, a, b):
    assert len(a.state) == len(b.state)
    if backend.name == "foreach" and backend.device == "cpu":  # whose operations round a vector's tail in another way
        for p, q in zip(parameters(a), parameters(b), strict=True):
            torch.testing.assert_close(p, q, rtol=2**-6 if p.element_size() == 2 else 1e-5, atol=1e-5, equal_nan=True)
        assert float(a.param_groups[0]["d"]) == pytest.approx(float(b.param_groups[0]["d"]), rel=1e-3)
        return
    assert frozen(a.state_dict()["state"]) == frozen(b.state_dict()["state"])
    assert frozen(parameters(a)) == frozen(parameters(b))
    ours, theirs = ([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in (a, b))
    assert frozen(ours) == frozen(theirs)


@exact
def test_the_bits_of_the_ordinary_step(backend, options):
    """Also where d moves, as in the first steps; without some gradients, with a first one late, with zeros and NaN."""
    once, released = pair(backend, **OPTIONS[options])
    params = parameters(once)
    for t in range(backend.steps(8)):
        without = {2: (0,), 3: (1, 3)}.get(t, ()) + ((2,) if t < 5 else ())
        for opt in (once, released):
            feed(opt, t, without=without)
            for p in parameters(opt):
                if t == 0 and p.grad is not None:
                    p.grad.zero_()
                if t == 6 and p is parameters(opt)[3]:
                    p.grad.view(-1)[1] = torch.nan
        once.step()
        by_one(released)
        same(backend, released, once)
    assert float(once.param_groups[0]["d"]) > D0
    assert params[2] in once.state


def test_a_gradient_that_is_missing_once_all_were_there(backend):
    """Its parameter keeps its state: only one whose first gradient does not come is without."""
    once, released = pair(backend)
    for t in range(4):
        for opt in (once, released):
            feed(opt, t, without=(1, 3) if t == 2 else ())
        once.step()
        by_one(released)
        same(backend, released, once)


def test_groups_of_their_own_and_one_that_rests(backend):
    def make(params):
        groups = [{"params": params[:1]}, {"params": params[1:3], "lr": 0.0}, {"params": params[3:]}]
        return backend(groups, d0=D0, split_groups=True)

    once, released = (make(make_params(torch.float32, backend.device)) for _ in range(2))
    for t in range(4):
        feed(once, t)
        feed(released, t)
        once.step()
        by_one(released)
        same(backend, released, once)


def test_gradients_that_nobody_released_are_stepped_at_the_end(backend):
    once, released = pair(backend)
    for t in range(4):
        feed(once, t)
        feed(released, t)
        once.step()
        for p in parameters(released)[1:3]:
            released.step_parameter(p, released.param_groups[0], 1)
        released.step()
        same(backend, released, once)


@wants_grad_dtype
def test_another_memory_order_and_gradients_of_float32(backend):
    once, released = pair(backend, torch.bfloat16)
    for t in range(3):
        for opt in (once, released):
            feed(opt, t)
            for p in parameters(opt):
                p.grad_dtype = None
                p.grad = p.grad.float() if t % 2 else p.grad
            p = parameters(opt)[0]
            p.grad = p.grad.t().contiguous().t()
        once.step()
        by_one(released)
        same(backend, released, once)


# -- with autograd -----------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, torch.randn(32, 6), torch.randn(32, 1)


def losses(model, x, y, opt, steps=6):
    found = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        found.append(loss.item())
    return found


def test_training_with_hooks():
    model, x, y = network()
    other, _, _ = network()
    opt, released = (Prodigy(m.parameters(), d0=D0, foreach=False) for m in (model, other))
    handle = prodigy_fused.enable_gradient_release(released)
    alive = []
    for p in other.parameters():
        p.register_hook(lambda g: alive.append(sum(q.grad is not None for q in other.parameters())))
    assert losses(other, x, y, released) == losses(model, x, y, opt)
    assert max(alive) == 0 and len(alive) == 6 * 6  # no gradient is kept while the next is computed
    handle.remove()
    assert losses(other, x, y, released) == losses(model, x, y, opt)
    assert max(alive) > 0


def test_a_parameter_never_used_gets_no_state():
    model, x, y = network()
    unused = nn.Parameter(torch.ones(3))
    opt = Prodigy([*model.parameters(), unused])
    prodigy_fused.enable_gradient_release(opt)
    losses(model, x, y, opt, 3)
    assert unused not in opt.state and len(opt.state) == 6
    assert opt.step_count == 3


def test_hooks_keep_no_optimizer_alive():
    model, x, y = network()
    opt = Prodigy(model.parameters())
    prodigy_fused.enable_gradient_release(opt)
    losses(model, x, y, opt, 2)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    (model(x) - y).square().mean().backward()  # the hooks have nothing to do
    assert all(p.grad is not None for p in model.parameters())


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_a_second_gradient(backend):
    opt = backend(make_params(torch.float32, backend.device), d0=D0)
    feed(opt, 0)
    p = parameters(opt)[0]
    opt.step_parameter(p)
    before = frozen(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 of shape \(4, 3\) got a second gradient before step"):
        opt.step_parameter(p)
    assert frozen(p) == before
    opt.step()
    feed(opt, 1)
    opt.step_parameter(p)
    opt.step()
    assert int(opt.param_groups[0]["k"]) == 2


def test_bad_gradients_and_parameters(backend):
    opt = backend(make_params(torch.float32, backend.device), d0=D0)
    feed(opt, 0)
    p = parameters(opt)[0]
    opt.step_parameter(parameters(opt)[1])
    parameters(opt)[1].grad = None
    p.grad = p.grad.to_sparse()
    before = frozen([parameters(opt), opt.state[parameters(opt)[1]]])
    with pytest.raises(RuntimeError, match="parameter 0"):
        opt.step_parameter(p)
    other = nn.Parameter(torch.ones(5))
    other.grad = torch.ones(5)
    with pytest.raises(ValueError, match=r"shape \(5,\) is not one of this optimizer"):
        opt.step_parameter(other)
    assert frozen([parameters(opt), opt.state[parameters(opt)[1]]]) == before
    p.grad = gradient(p, 0, 0)
    once = backend(make_params(torch.float32, backend.device), d0=D0)
    feed(once, 0)
    once.step()
    by_one(opt)
    same(backend, opt, once)


def test_an_open_step_refuses_what_would_tear_it():
    opt = Prodigy(make_params(torch.float32), d0=D0)
    feed(opt, 0)
    saved = opt.state_dict()
    opt.step_parameter(parameters(opt)[0])
    for act in (
        opt.state_dict,
        lambda: copy.deepcopy(opt),
        lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        lambda: setattr(opt, "process_group", None),
    ):
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            act()
    opt.load_state_dict(saved)  # which is the way out
    assert opt.state_dict()["state"] == {}
    opt.step()
    assert opt.step_count == 1


@pytest.mark.parametrize("what", ["d", "state", "parameters"])
def test_an_open_step_notices_what_was_replaced(what):
    opt = Prodigy(make_params(torch.float32), d0=D0)
    feed(opt, 0)
    opt.step_parameter(parameters(opt)[0])
    if what == "d":
        opt.param_groups[0]["d"] = 0.5
    elif what == "state":
        opt.state.clear()
    else:
        opt.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        opt.step()


def test_nothing_is_opened_by_what_is_refused():
    opt = Prodigy(make_params(torch.float32), d0=D0)
    p, other = parameters(opt)[0], nn.Parameter(torch.ones(5))
    opt.step_parameter(p)  # no gradient
    other.grad = torch.ones(5)
    p.grad = torch.ones(4, 3).to_sparse()
    for q, error in ((other, ValueError), (p, RuntimeError)):
        with pytest.raises(error):
            opt.step_parameter(q)
    assert not opt.state
    opt.state_dict()


def test_memory_that_moves_in_the_middle_of_a_step(backend):
    """As where blocks are swapped in and out: before a parameter's turn, and after it."""
    once, released = pair(backend)
    for t in range(4):
        feed(once, t)
        feed(released, t)
        once.step()
        params = parameters(released)
        released.step_parameter(params[0])
        for p in params[:3]:
            p.data = p.data.clone()
        for p in params[1:]:
            released.step_parameter(p)
        params[3].data = params[3].data.clone(memory_format=torch.preserve_format)
        released.step()
        same(backend, released, once)


def test_a_parameter_cast_in_the_middle_of_a_step():
    opt = Prodigy(make_params(torch.float32), d0=D0)
    feed(opt, 0)
    params = parameters(opt)
    opt.step_parameter(params[0])
    params[1].data = params[1].data.double()
    params[1].grad = None
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        opt.step_parameter(params[1])


def test_a_gradient_that_comes_after_the_parameter_was_stepped():
    model, x, y = network()
    opt = Prodigy(model.parameters(), d0=D0)
    handle = prodigy_fused.enable_gradient_release(opt)
    (model(x) - y).square().mean().backward()
    handle.remove()
    (model(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match="a second gradient before step"):
        opt.step()
    opt.zero_grad()
    opt.step()
    assert opt.step_count == 1


def test_after_an_error_in_backward_step_ends_what_was_begun():
    model, x, y = network()
    opt = Prodigy(model.parameters(), d0=D0)
    prodigy_fused.enable_gradient_release(opt)
    first = model[0].weight
    hook = first.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (model(x) - y).square().mean().backward()
    hook.remove()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="a second gradient"):
        (model(x) - y).square().mean().backward()
    assert all(p.grad is None for p in model.parameters() if p is not first)
    opt.zero_grad()
    opt.step()
    assert opt.step_count == 1 and first not in opt.state
    losses(model, x, y, opt, 3)
    assert opt.step_count == 4


def test_a_learning_rate_counts_from_the_next_step():
    once, released = (Prodigy(make_params(torch.float32), d0=D0) for _ in range(2))
    for t in range(4):
        feed(once, t)
        feed(released, t)
        once.step()
        for p in parameters(released):
            released.step_parameter(p)
        for opt in (once, released):
            opt.param_groups[0]["lr"] = 0.5**t
        released.step()
        assert frozen(parameters(once)) == frozen(parameters(released))


def test_closures():
    model, x, y = network()
    other, _, _ = network()
    opt, released = (Prodigy(m.parameters(), d0=D0) for m in (model, other))
    prodigy_fused.enable_gradient_release(released)
    for each, own in ((model, opt), (other, released)):

        def closure(each=each, own=own):
            own.zero_grad()
            loss = (each(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(4):
            own.step(closure)
    assert frozen(list(model.parameters())) == frozen(list(other.parameters()))


def test_a_scaler():
    opt = Prodigy(make_params(torch.float32), d0=D0)
    feed(opt, 0)
    opt.step_parameter(parameters(opt)[0])
    opt.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="a gradient scaler cannot be used with gradient release"):
        opt.step()
    opt.grad_scale = None
    opt.load_state_dict(opt.state_dict())
    opt.found_inf = torch.tensor(0.0)
    feed(opt, 1)
    with pytest.raises(RuntimeError, match="a gradient scaler"):
        opt.step_parameter(parameters(opt)[0])


def test_another_optimizer():
    with pytest.raises(TypeError, match=r"needs a prodigy_fused.Prodigy, not SGD"):
        prodigy_fused.enable_gradient_release(torch.optim.SGD([torch.ones(1)]))


def test_trainers_ask_for_it():
    opt = Prodigy([torch.ones(1)])
    assert opt.supports_fused_back_pass()
    opt.step_parameter(opt.param_groups[0]["params"][0], opt.param_groups[0], 0)  # no gradient, nothing to do
    assert not opt.state


def test_one_optimizer_for_each_parameter_is_noticed(monkeypatch):
    """As torch's _apply_optimizer_in_backward makes them, and the containers of torchtune and torchtitan."""
    monkeypatch.setattr(release, "_in_backward", weakref.WeakSet())
    model, x, y = network()
    own = {p: Prodigy([p]) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: own[p].step())
    with pytest.warns(UserWarning, match="backward steps a Prodigy optimizer for each parameter"):
        (model(x) - y).square().mean().backward()
    (model(x) - y).square().mean().backward()  # said once
    for p, opt in own.items():
        p.grad = torch.ones_like(p)
        opt.step()


@pytest.mark.parametrize("added", [False, True])
def test_what_gets_a_gradient_later_is_released_too(added):
    """Nobody calls zero_grad(), so a gradient that a step left there would be added to the next one."""
    opts = []
    for _ in range(2):
        params = make_params()
        late = params.pop()
        opts.append(Prodigy(params if added else [*params, late], d0=D0))
        late.requires_grad_(added)
        for opt in opts[1:]:
            handle = prodigy_fused.enable_gradient_release(opt)
        if added:
            opts[-1].add_param_group({"params": [late]})
        late.requires_grad_(False)
    for t in range(4):
        for opt in opts:
            parameters(opt)[-1].requires_grad_(t > 0)
            sum((p * gradient(p, i, t)).sum() for i, p in enumerate(parameters(opt))).backward()
            opt.step()
            if opt is opts[0]:
                opt.zero_grad()
            assert all(p.grad is None for p in parameters(opt))
    assert frozen(parameters(opts[0])) == frozen(parameters(opts[1])) and opts[0].d == opts[1].d
    late = parameters(opts[1])[-1]
    late.sum().backward()
    assert late.grad is None  # by its own hook
    handle.remove()
    opts[1].step()
    late.sum().backward()
    opts[1].step()
    assert late.grad is not None


def test_a_step_does_not_look_for_other_wrappers_again(monkeypatch):
    """It would look at every object there is."""
    calls = []
    monkeypatch.setattr(release, "check_gradients_are_final", calls.append)
    opt = Prodigy(make_params(), d0=D0)
    prodigy_fused.enable_gradient_release(opt)
    for t in range(3):
        sum((p * gradient(p, i, t)).sum() for i, p in enumerate(parameters(opt))).backward()
        opt.step()
    assert len(calls) == 1


def test_parameters_can_be_swapped():
    """torch does so where a module of DTensors is cast, and refuses what weak references refer to."""
    opt = Prodigy([nn.Parameter(torch.ones(3))])
    prodigy_fused.enable_gradient_release(opt)
    (p,) = parameters(opt)
    torch.utils.swap_tensors(p, nn.Parameter(torch.zeros(3)))
    p.sum().backward()
    opt.step()
    assert p.grad is None and p.any()


def test_what_foreach_makes_for_a_gradient_is_freed_with_it():
    opt = Prodigy([nn.Parameter(torch.ones(256, 1024)) for _ in range(4)], backend="foreach")
    gc.collect()
    gc.disable()  # nothing may be in a cycle
    try:
        for p in parameters(opt):
            p.grad = torch.ones_like(p)
            opt.step_parameter(p)
            p.grad = None
        size = p.numel()
        alive = {t.data_ptr() for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.numel() == size}
        kept = {
            t.data_ptr() for q in parameters(opt) for t in (q, *opt.state[q].values()) if isinstance(t, torch.Tensor)
        }
        assert alive <= kept
        opt.step()
    finally:
        gc.enable()
