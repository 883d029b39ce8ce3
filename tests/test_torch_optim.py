"""What torch's own tests ask of every optimizer: the numbers, the groups, and what is refused.

The rest is in test_torch_gradients.py, test_torch_state.py, test_torch_hooks.py and test_torch_tools.py.
To run torch's test/test_optim.py itself, append ``torch_inputs.optimizer_info()`` to its ``optim_db``.
"""

import math

import pytest
import torch
from toolbox import TIGHT, agree, feed, frozen, make_params, parameters, refused, train
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch_inputs import (
    IMPLEMENTATIONS,
    common_optimizers,
    each_case,
    each_implementation,
    each_input,
    kwargs_of,
    optimizer_info,
    regression,
    tensors,
)

from prodigy_fused import Prodigy

STEPS = 4

# -- what torch's private module knows of every optimizer ------------------------------------------------------


def test_errors(subtests):
    """What any optimizer of torch refuses, and bad arguments of ours: one exception that names the argument."""
    errors = optimizer_info().optim_error_inputs_func("cpu", torch.float32)
    assert len(errors) > 20
    for error in errors:
        if error.error_type is FutureWarning:  # of a set, since torch 2.15; it is refused here, see test_bad_input.py
            continue
        given = error.optimizer_error_input
        with subtests.test(given.desc), pytest.raises(error.error_type, match=error.error_regex):
            Prodigy([nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params, **given.kwargs)


def test_what_adamw_is_given(subtests):
    """Arguments of torch's AdamW that we have too, in each implementation."""
    info = next(info for info in common_optimizers().optim_db if info.optim_cls is torch.optim.AdamW)
    inputs = [given for given in info.optim_inputs_func("cpu") if "amsgrad" not in given.kwargs]
    assert len(inputs) >= 4
    for given in inputs:
        for impl, implementation in IMPLEMENTATIONS.items():
            with subtests.test(given.desc, impl=impl):
                params = tensors()
                opt = Prodigy(params, **given.kwargs, **implementation)
                before = [p.detach().clone() for p in params]
                opt.step(regression(*params, opt))
                assert not any(map(torch.equal, before, params))


def test_right_direction_with_schedulers(subtests):
    info = optimizer_info()
    for given in info.optim_inputs_func("cpu"):
        if given.desc == "1-dim tensor lr" and not hasattr(lr_scheduler, "_update_param_group_val"):
            continue  # torch 2.6, whose schedulers cannot change one
        for schedulers in info.scheduler_inputs:
            with subtests.test(given.desc):
                params = tensors()
                opt = Prodigy(params, **given.kwargs)
                closure, schedules = regression(*params, opt), [schedule(opt) for schedule in schedulers]
                first = closure().item()
                for _ in range(20):
                    loss = opt.step(closure)
                    for schedule in schedules:
                        schedule.step(*([loss.item()] if isinstance(schedule, ReduceLROnPlateau) else []))
                assert (closure().item() > first) == given.kwargs.get("maximize", False)


# -- numbers -----------------------------------------------------------------------------------------------------


@each_input
def test_every_backend_agrees_with_the_loop(backend, desc):
    """On a list with an empty tensor and a 0-dim one at its end."""
    lists = [make_params(device=backend.device, shapes=((6, 5), (7,), (2, 0, 3), ())) for _ in range(2)]
    opt, loop = backend(lists[0], **kwargs_of(desc)), Prodigy(lists[1], **kwargs_of(desc, "loop"))
    train(opt, loop, steps=STEPS)
    assert opt.d == pytest.approx(loop.d, rel=TIGHT) and opt.d > opt.d0
    for p, q in zip(*lists, strict=True):
        torch.testing.assert_close(p, q, rtol=TIGHT, atol=TIGHT)
        torch.testing.assert_close(dict(opt.state[p]), dict(loop.state[q]), rtol=TIGHT, atol=TIGHT)


def test_mixed_dtypes_in_one_group(backend):
    """Each as accurate as its dtype; d is common, so it is as accurate as the coarsest."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def params():
        made = [make_params(dtype, backend.device, ((5, 3), (7,))) for dtype in dtypes]
        return [p for pair in made for p in pair]

    opt, loop = backend(params(), d0=1e-2), Prodigy(params(), d0=1e-2, fused=False, foreach=False)
    train(opt, loop, steps=STEPS)
    assert opt.d == pytest.approx(loop.d, rel=1e-5)
    for p, q in zip(parameters(opt), parameters(loop), strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=max(1e-5, 2 * torch.finfo(p.dtype).eps), atol=1e-5)


@pytest.mark.parametrize("desc", ["default", "tensor lr", "no momentum", "16-bit state"])
def test_default_dtype(backend, desc):
    """A step's numbers do not depend on the default dtype."""
    before, runs = torch.get_default_dtype(), []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            opt = backend(make_params(torch.float32, backend.device), **kwargs_of(desc))
            train(opt, steps=STEPS)
            runs.append(frozen([opt.state_dict(), parameters(opt)]))
        finally:
            torch.set_default_dtype(before)
    assert runs[0] == runs[1]


@each_case
@pytest.mark.parametrize("gaps", [False, True], ids=["contiguous", "non-contiguous"])
def test_right_direction(impl, gaps, desc):
    kwargs = kwargs_of(desc, impl)
    if gaps and impl == "fused":
        kwargs["fused"] = None  # with fused=True tensors with gaps are refused
    params = tensors(gaps=gaps)
    opt = Prodigy(params, **kwargs)
    closure = regression(*params, opt)
    first = closure().item()
    for _ in range(20):
        opt.step(closure)
    assert (closure().item() > first) == kwargs.get("maximize", False)


@pytest.mark.parametrize("desc", ["default", "L2 penalty", "sampled estimate"])
def test_strides_of_gradients_do_not_matter(backend, desc):
    def run(spread):
        opt = backend(make_params(torch.float64, backend.device), **kwargs_of(desc))
        for t in range(2):
            feed(opt, t)
            for p in parameters(opt):
                p.grad = spread(p.grad)
            opt.step()
        return opt

    with_gaps = run(lambda g: torch.stack([g, torch.full_like(g, math.nan)], -1)[..., 0])
    transposed = run(lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0) if g.dim() else g)
    plain = run(lambda g: g)
    agree(with_gaps, plain, grown=False)
    agree(transposed, plain, grown=False)


@pytest.mark.parametrize(("shape", "dtype"), [((), torch.float32), ((1,), torch.float64), ((1, 1), torch.float32)])
def test_tensor_lr(backend, shape, dtype):
    """It is kept as the tensor it is, read at every step, never written; and it is worth as much as a number."""
    lr = torch.full(shape, 0.5, dtype=dtype)
    opt, plain = (backend(make_params(device=backend.device), lr=value, d0=1e-2) for value in (lr, 0.5))
    train(opt, plain, steps=2)
    lr.fill_(0.25)
    plain.param_groups[0]["lr"] = 0.25
    train(opt, plain, steps=1, start=2)
    agree(opt, plain, rtol=0.0)
    assert opt.param_groups[0]["lr"] is lr
    assert torch.equal(lr, torch.full(shape, 0.25, dtype=dtype))


# -- groups ------------------------------------------------------------------------------------------------------


@each_case
def test_groups_with_their_own_lr(impl, desc):
    kwargs, irrelevant = kwargs_of(desc, impl), nn.Parameter(torch.randn(2))
    before, params = irrelevant.detach().clone(), tensors()
    of_the_estimate = ("d0", "betas", "beta3", "d_coef", "growth_rate", "slice_p")
    shared = {name: kwargs.pop(name) for name in of_the_estimate if name in kwargs}
    opt = Prodigy([{"params": params, "lr": 0.5, **kwargs}, {"params": [irrelevant], "lr": 1e-28}], **shared)
    closure = regression(*params, opt)
    first = closure().item()
    for _ in range(20):
        closure()
        irrelevant.grad = torch.rand_like(irrelevant)
        opt.step()
    assert (closure().item() > first) == kwargs.get("maximize", False)
    assert torch.equal(irrelevant, before)


@each_implementation
def test_groups_with_their_own_weight_decay(impl):
    """Without a gradient's help: decay shrinks the one, and leaves the other alone."""
    decayed, kept = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [decayed], "weight_decay": 0.9}, {"params": [kept]}]
    opt = Prodigy(groups, d0=1e-2, **IMPLEMENTATIONS[impl])
    for _ in range(3):
        decayed.grad, kept.grad = torch.zeros(3), torch.zeros(3)
        opt.step()
    # With no gradient at all there is no estimate, and no step; one elsewhere starts it.
    opt.add_param_group({"params": [other := nn.Parameter(torch.ones(1))]})
    for _ in range(3):
        decayed.grad, kept.grad, other.grad = torch.zeros(3), torch.zeros(3), torch.ones(1)
        opt.step()
    assert torch.equal(kept, torch.ones(3))
    assert (decayed < 1).all()


@each_implementation
def test_named_parameters(impl):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    names = [name for name, _ in model.named_parameters()]
    named = Prodigy(model.named_parameters(), **IMPLEMENTATIONS[impl])
    assert named.param_groups[0]["param_names"] == names
    assert all(a is b for a, b in zip(parameters(named), model.parameters(), strict=True))
    by_layer = Prodigy([{"params": layer.named_parameters()} for layer in model], **IMPLEMENTATIONS[impl])
    assert [group["param_names"] for group in by_layer.param_groups] == [["weight", "bias"]] * 2
    train(named, by_layer, steps=2)
    with refused(named, ValueError, "names"):
        named.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
