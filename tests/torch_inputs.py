"""Our optimizer as torch's own tests describe an optimizer: an ``OptimizerInfo`` with inputs, and inputs that raise.

The classes are those of ``torch.testing._internal.common_optimizers`` of the installed torch, which is private: where
it, or ``expecttest``, which it imports, is missing, tests that need it are skipped.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from toolbox import ON_CPU, parameters
from torch import Tensor

from prodigy_fused import Prodigy, backends
from prodigy_fused.options import OPTIONS

# d0, so that d grows within a few steps. No implementation (fused, foreach) here: each test adds its own.
D0 = {"d0": 1e-2}
INPUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lr": {"lr": 0.5},
    "tensor lr": {"lr": torch.tensor(0.5)},
    "1-dim tensor lr": {"lr": torch.tensor([0.5])},
    "weight decay": {"weight_decay": 0.1},
    "L2 penalty": {"weight_decay": 0.1, "decouple": False},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "tensor betas": {"betas": (torch.tensor(0.8), torch.tensor([[0.99]]))},
    "no momentum": {"betas": (0.0, 0.99), "beta3": 0.9},
    "bias correction": {"use_bias_correction": True},
    "safeguarded warm-up": {"safeguard_warmup": True, "lr": 0.5},
    "bounded growth": {"d_coef": 0.5, "growth_rate": 1.5, "eps": 1e-6},
    "sampled estimate": {"slice_p": 2, "weight_decay": 0.1},
    "capturable": {"capturable": True, "lr": torch.tensor(0.5)},
    "16-bit state": {"state_dtype": "bfloat16"},
    "state of the parameter's dtype": {"state_dtype": None, "low_precision": "nearest"},
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "loop": {"fused": False, "foreach": False},
    "foreach": {"fused": False, "foreach": True},
    "fused": {"fused": True, "foreach": False},
}
# By torch's description: what is raised where it is not what torch raises, and words of the message.
OWN_ERRORS: dict[str, tuple[type[Exception], str]] = {
    "duplicate parameters should not occur across param groups either": (ValueError, "duplicate of parameter 0"),
    "Tensor lr must be 1-element": (ValueError, "Invalid lr: "),
}
BAD_KWARGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative lr": ({"lr": -1e-2}, ValueError, "Invalid lr: -0.01"),
    "infinite lr": ({"lr": float("inf")}, ValueError, "Invalid lr: inf"),
    "a word as lr": ({"lr": "1"}, ValueError, "Invalid lr: '1'"),
    "beta1": ({"betas": (1.0, 0.0)}, ValueError, r"Invalid betas\[0\]: 1.0"),
    "beta2": ({"betas": (0.9, -0.1)}, ValueError, r"Invalid betas\[1\]: -0.1"),
    "three betas": ({"betas": (0.9, 0.9, 0.9)}, ValueError, "Invalid betas"),
    "beta3": ({"beta3": 1.5}, ValueError, "Invalid beta3: 1.5"),
    "negative eps": ({"eps": -1e-8}, ValueError, "Invalid eps: -1e-08"),
    "negative weight_decay": ({"weight_decay": -1}, ValueError, "Invalid weight_decay: -1"),
    "d0": ({"d0": 0.0}, ValueError, "Invalid d0: 0.0"),
    "d_coef": ({"d_coef": -1.0}, ValueError, "Invalid d_coef: -1.0"),
    "growth_rate": ({"growth_rate": 0.5}, ValueError, "Invalid growth_rate: 0.5"),
    "slice_p": ({"slice_p": 0}, ValueError, "Invalid slice_p: 0"),
    "state_dtype": ({"state_dtype": torch.int8}, ValueError, "Invalid state_dtype: torch.int8"),
    "low_precision": ({"low_precision": "up"}, ValueError, "Invalid low_precision: 'up'"),
    "unknown backend": ({"backend": "tpu"}, ValueError, "Invalid backend: 'tpu'"),
    "fused and foreach": ({"fused": True, "foreach": True}, ValueError, "fused=True and foreach=True"),
    "differentiable": ({"differentiable": True}, TypeError, "differentiable"),
    "amsgrad": ({"amsgrad": True}, TypeError, "amsgrad"),
    "momentum": ({"momentum": 0.9}, TypeError, "momentum"),
}


def common_optimizers() -> ModuleType:
    """Returns torch's private module; skips the test where it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)
    # Importing it freezes torch.backends.* for the rest of the process.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return common


def optim_inputs(device: Any = "cpu", dtype: torch.dtype | None = None) -> list[Any]:
    common = common_optimizers()
    return [common.OptimizerInput(None, {**D0, **kwargs}, desc) for desc, kwargs in INPUTS.items()]


def optim_error_inputs(device: Any, dtype: torch.dtype) -> list[Any]:
    """Returns what every optimizer of torch refuses, and what we do."""
    common = common_optimizers()
    errors = common.get_error_inputs_for_all_optims(device, dtype)
    for error in errors:
        error.error_type, error.error_regex = OWN_ERRORS.get(
            error.optimizer_error_input.desc, (error.error_type, error.error_regex)
        )
    for desc, (kwargs, kind, words) in BAD_KWARGS.items():
        bad = common.OptimizerInput(None, kwargs, desc)
        errors.append(common.ErrorOptimizerInput(bad, error_type=kind, error_regex=words))
    return errors


def optimizer_info() -> Any:
    """Returns the entry that our optimizer would have in torch's ``optim_db``."""
    return common_optimizers().OptimizerInfo(
        Prodigy,
        optim_inputs_func=optim_inputs,
        optim_error_inputs_func=optim_error_inputs,
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=tuple(name for name, option in OPTIONS.items() if not option.in_reference),
        has_capturable_arg=True,
        supports_complex=False,
        supports_fused_on=("cpu", "cuda"),
    )


# -- the same inputs where the private module is missing -----------------------------------------------------


def _implementation(name: str) -> Any:
    if name == "fused" and not set(backends.compiled()) & set(ON_CPU):
        return pytest.param(name, marks=pytest.mark.skip(reason="no compiled backend here"))
    return name


each_input = pytest.mark.parametrize("desc", INPUTS)
each_implementation = pytest.mark.parametrize("impl", [_implementation(name) for name in IMPLEMENTATIONS])
# Every input with the implementation that has most code of its own, with the others those that change the state's form.
FORMS = ["default", "1-dim tensor lr", "sampled estimate", "capturable", "16-bit state"]
each_case = pytest.mark.parametrize(
    ("impl", "desc"),
    [
        pytest.param(*getattr(impl, "values", [impl]), desc, marks=getattr(impl, "marks", ()))
        for impl in map(_implementation, IMPLEMENTATIONS)
        for desc in (INPUTS if impl not in ("loop", "foreach") else FORMS)
    ],
)


def kwargs_of(desc: str, impl: str | None = None) -> dict[str, Any]:
    """Returns the arguments of one input, for one implementation or for the default one; the caller may change them."""
    return copy.deepcopy({**D0, **INPUTS[desc], **(IMPLEMENTATIONS[impl] if impl else {})})


def tensors(dtype: torch.dtype = torch.float32, gaps: bool = False) -> list[Tensor]:
    """Returns a weight and a bias, the same at every call; with ``gaps`` every other element of larger tensors."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(dtype) for shape in ((6, 5), (6,))]
    return [(t[..., 0] if gaps else t[..., 0].clone()).requires_grad_() for t in wide]


def regression(weight: Tensor, bias: Tensor, opt: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """Returns a closure: the loss of a small regression, and its gradients."""
    x = torch.linspace(-1, 1, 5).to(weight.dtype)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def started(desc: str, impl: str | None = None, steps: int = 3, named: bool = False) -> tuple[Prodigy, Any]:
    """Returns an optimizer after some steps of the regression, and its closure."""
    params = tensors()
    opt = Prodigy(zip(("weight", "bias"), params, strict=True) if named else params, **kwargs_of(desc, impl))
    closure = regression(*params, opt)
    for _ in range(steps):
        opt.step(closure)
    return opt, closure


def twin(
    opt: Prodigy, desc: str, impl: str, dtype: torch.dtype | None = None, named: bool = False
) -> tuple[Prodigy, Any]:
    """Returns a new optimizer, on equal parameters, of an optimizer of :func:`started`, and its closure."""
    params = [p.detach().clone().to(dtype).requires_grad_() for p in parameters(opt)]
    again = Prodigy(zip(("w", "b"), params, strict=True) if named else params, **kwargs_of(desc, impl))
    return again, regression(*params, again)


def run(*pairs: tuple[Prodigy, Any], steps: int = 3) -> None:
    """Steps optimizers with their closures."""
    for opt, closure in pairs:
        for _ in range(steps):
            opt.step(closure)
