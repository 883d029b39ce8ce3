"""Helpers of the contract tests: parameters, gradient sequences, twins on two optimizers, snapshots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import emulated
import interpreted
import prodigyopt
import pytest
import torch
from torch import Tensor, nn

from prodigy_fused import Prodigy, backends
from prodigy_fused.estimate import FIELDS

emulated.register()  # here, too, for the processes that tests start
interpreted.register()
# Agreement with prodigyopt in float64: the two round in different orders, and 1e-12 is some 5,000 roundings.
TIGHT = 1e-12
# With d0 = 1e-6 and x of about 1 the estimate rests on x0 - x of about 1e-6, of which float64 keeps ten
# digits: there, not even two right answers agree to 1e-12.
D0 = 1e-3
# A matrix, a zero-initialised vector (its p0 is 0-dim in checkpoints), a scalar, a channels_last convolution.
SHAPES = ((4, 3), (7,), (), (2, 3, 2, 2))
ZERO, NHWC = 1, 3


def make_params(dtype: torch.dtype = torch.float64, device: Any = "cpu", shapes=SHAPES) -> list[nn.Parameter]:
    """The same parameters at every call."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if shapes is SHAPES:
        values[ZERO].zero_()
        values[NHWC] = values[NHWC].to(memory_format=torch.channels_last)
    return [nn.Parameter(v.to(device=device, dtype=dtype)) for v in values]


def gradient(p: Tensor, index: int, t: int) -> Tensor:
    """The gradient of parameter ``index`` at step ``t``: a fixed direction and noise, so that d grows."""
    fixed, noise = (torch.Generator().manual_seed(seed) for seed in (index, 1000 * (t + 1) + index))
    g = torch.randn(p.shape, generator=fixed, dtype=torch.float64)
    g += 0.3 * torch.randn(p.shape, generator=noise, dtype=torch.float64)
    return g.to(device=p.device, dtype=p.dtype)


def parameters(opt: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in opt.param_groups))


def feed(opt: torch.optim.Optimizer, t: int, without: tuple[int, ...] = ()) -> None:
    """Gives every parameter its gradient of step ``t``, those ``without`` None."""
    for i, p in enumerate(parameters(opt)):
        p.grad = None if i in without else gradient(p, i, t)


def train(*opts: torch.optim.Optimizer, steps: int = 8, start: int = 0) -> None:
    """Steps every optimizer through the same gradients."""
    for t in range(start, start + steps):
        for opt in opts:
            feed(opt, t)
            opt.step()


def make(backend: Any = None, params: Any = None, **options: Any) -> Prodigy:
    """Our optimizer on ``make_params()``, where ``backend`` (the fixture, a name, or None) wants them."""
    params = make_params(device=device_of(backend)) if params is None else params
    return Prodigy(params, backend=getattr(backend, "name", backend), **{"d0": D0, **options})


def twins(backend: Any = None, **options: Any) -> tuple[Prodigy, prodigyopt.Prodigy]:
    """Ours and the reference package's, on equal parameters in float64."""
    ours = make(backend, **options)
    theirs = make_params(device=parameters(ours)[0].device)
    return ours, prodigyopt.Prodigy(theirs, **{"d0": D0, **options})


def agree(a: torch.optim.Optimizer, b: torch.optim.Optimizer, rtol: float = TIGHT, grown: bool = True):
    """Asserts equal d, k, parameters and state; by default also that d has left d0, or it means little."""
    ours, theirs = a.param_groups[0], b.param_groups[0]
    assert not grown or float(theirs["d"]) > theirs["d0"]
    assert float(ours["d"]) == pytest.approx(float(theirs["d"]), rel=rtol)
    assert int(ours["k"]) == int(theirs["k"])
    for i, (p, q) in enumerate(zip(parameters(a), parameters(b), strict=True)):
        states = a.state.get(p, {}), b.state.get(q, {})
        assert states[0].keys() - {"step"} == states[1].keys() - {"step"}, f"parameter {i}"
        pairs = {key: [state[key] for state in states] for key in states[0].keys() - {"step"}}
        for name, pair in {"x": [p, q], **pairs}.items():
            got, wanted = (t.detach().cpu().flatten() for t in pair)
            scale = wanted.abs().max().double().clamp_min(1e-300)
            error = (got - wanted).abs().max() / scale
            assert error <= rtol, f"{name} of parameter {i} of shape {tuple(p.shape)}: error {error:.1e}"


def device_of(backend: Any) -> str | None:
    """The device on which this machine can run a backend, None if on none."""
    if backend is None:
        return "cpu"
    name = getattr(backend, "name", backend)
    unsupported = backends.get(name).unsupported
    group = {**Prodigy([torch.zeros(1)], fused=False).param_groups[0], "backend": name}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        if unsupported(torch.zeros(1, device=device), group) is None:
            return device
    return None


def _present(name: str) -> Any:
    absent = pytest.mark.skipif(device_of(name) is None, reason=f"no {name} backend here")
    return pytest.param(name, marks=absent)


NAMES = [_present(name) for name in backends.names()]
ON_CPU = [name for name in backends.names() if device_of(name) == "cpu"]
each_compiled = pytest.mark.parametrize("backend", [_present(name) for name in backends.compiled()])
wants_grad_dtype = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="before torch 2.10 a gradient has its parameter's dtype"
)


def used(opt: Prodigy) -> set[str]:
    """The backends that took the last step."""
    assert opt._runtime.plans is not None
    return {key.backend for key in opt._runtime.plans.keys}


def frozen(value: Any) -> Any:
    """A deep copy that ``==`` compares bit by bit, NaN and strides included."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            value = value.to_dense()
        content = None if value.device.type == "meta" else repr(value.tolist())
        return str(value.dtype), str(value.device), tuple(value.shape), value.stride(), content
    if isinstance(value, dict):
        return {key: frozen(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(v) for v in value]
    return repr(value)


def snapshot(opt: torch.optim.Optimizer) -> Any:
    """Everything a step or a load could change."""
    params = parameters(opt)
    grads = [p.grad for p in params]
    state = [dict(opt.state[p]) if p in opt.state else None for p in params]
    # An estimate is a number, or on a GPU a tensor, after a step a new one.
    shown = [{name: group[name] for name in FIELDS if name in group} for group in opt.param_groups]
    numbers = [{k: v if v is None or isinstance(v, str) else float(v) for k, v in each.items()} for each in shown]
    groups = [
        {**group, **own, "params": list(map(id, group["params"]))}
        for group, own in zip(opt.param_groups, numbers, strict=True)
    ]
    return frozen({"params": params, "grads": grads, "state": state, "groups": groups})


@contextlib.contextmanager
def refused(opt: torch.optim.Optimizer, error: Any, *wanted: str) -> Iterator[None]:
    """Asserts that the block raises ``error``, naming all of ``wanted``, and changes nothing in ``opt``."""
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        yield
    assert [word for word in wanted if word not in str(caught.value)] == [], str(caught.value)
    assert snapshot(opt) == before
