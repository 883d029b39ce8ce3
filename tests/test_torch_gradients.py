"""What torch's own tests ask of every optimizer: steps that do nothing, and gradients of another kind."""

import pytest
import torch
from toolbox import parameters, refused, snapshot, train
from torch import nn
from torch_inputs import IMPLEMENTATIONS, each_case, each_implementation, kwargs_of, started

from prodigy_fused import Prodigy

# -- steps that do nothing, gradients of another kind --------------------------------------------------------------


@each_case
def test_nothing_moves_without_gradients(impl, desc):
    params = [torch.randn(2, 3), torch.randn(2)]
    before = [p.clone() for p in params]
    opt = Prodigy(params, **kwargs_of(desc, impl))
    loss = torch.tensor([1.0])
    assert opt.step(lambda: loss) is loss
    assert all(map(torch.equal, before, params))
    assert not opt.state


@each_case
def test_nothing_moves_for_gradients_of_zero(impl, desc):
    p = torch.randn(5, 1, requires_grad=True)
    before = p.detach().clone()
    opt = Prodigy([p], **{**kwargs_of(desc, impl), "weight_decay": 0})
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.equal(p, before)


@each_case
def test_found_inf_skips_the_step(impl, desc):
    opt, closure = started(desc, impl)
    before = snapshot(opt)
    for scale in (None, torch.ones(1)):
        closure()
        opt.grad_scale, opt.found_inf = scale, torch.ones(())
        opt.step()
        after = snapshot(opt)
        assert [after[key] for key in ("params", "state", "groups")] == [
            before[key] for key in ("params", "state", "groups")
        ]
    opt.grad_scale, opt.found_inf = None, torch.zeros(())
    opt.step(closure)
    assert snapshot(opt)["params"] != before["params"]


@each_case
def test_gradients_are_never_written(impl, desc):
    opt, closure = started(desc, impl)
    closure()
    grads = [(p.grad, p.grad.clone(), p.grad._version) for p in parameters(opt)]
    opt.step()
    for p, (grad, values, version) in zip(parameters(opt), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, values)
        assert grad._version == version


def test_an_empty_gradient(backend):
    params = [nn.Parameter(torch.ones(shape, device=backend.device)) for shape in ((0, 3), (2,))]
    opt = backend(params, d0=1e-2)
    train(opt, steps=3)
    assert params[0].shape == (0, 3)
    assert not torch.equal(params[1].cpu(), torch.ones(2))


@each_implementation
def test_complex_parameters_are_refused_and_their_real_views_are_not(impl):
    with pytest.raises(TypeError, match=r"parameter 0 of shape \(4,\) has dtype torch.complex64.*view_as_complex"):
        Prodigy([nn.Parameter(torch.randn(4, dtype=torch.complex64))], **IMPLEMENTATIONS[impl])
    z = torch.randn(4, dtype=torch.complex128)
    pairs = nn.Parameter(torch.view_as_real(z).clone())
    apart = [nn.Parameter(z.real.clone()), nn.Parameter(z.imag.clone())]
    opts = [Prodigy(params, d0=1e-2, **IMPLEMENTATIONS[impl]) for params in ([pairs], apart)]
    for _ in range(6):
        for opt, value in ((opts[0], torch.view_as_complex(pairs)), (opts[1], torch.complex(*apart))):
            opt.zero_grad()
            (value * (1 + 2j) - 1).abs().pow(2).sum().backward()
            opt.step()
    assert opts[0].d > 1e-2
    torch.testing.assert_close(pairs.detach(), torch.stack(apart, -1).detach(), rtol=1e-12, atol=1e-12)


@each_implementation
def test_sparse_gradients_are_refused_as_torch_does(impl):
    table = nn.Embedding(5, 2, sparse=True)
    opt = Prodigy(table.parameters(), **IMPLEMENTATIONS[impl])
    table(torch.tensor([1, 3])).sum().backward()
    with refused(opt, RuntimeError, "parameter 0", "sparse"):
        opt.step()


@each_implementation
def test_a_parameter_twice_in_one_group_warns_and_steps_once(impl):
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate"):
        opt = Prodigy([p, p], d0=1e-2, **IMPLEMENTATIONS[impl])
    once = Prodigy([q], d0=1e-2, **IMPLEMENTATIONS[impl])
    for _ in range(3):
        p.grad, q.grad = p.detach() + 1, q.detach() + 1
        opt.step()
        once.step()
    assert torch.equal(p, q)
