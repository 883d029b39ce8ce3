"""Gradient release: each parameter is stepped, and its gradient freed, as soon as backward has it.

The step itself is in open_step.py. What cannot be known one gradient at a time is refused, or said in docs/memory.md.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SCALED = (
    "a gradient scaler cannot be used with gradient release: when it finds an infinity, other parameters have been "
    "stepped; train in bfloat16, or without gradient release"
)


class GradientRelease:
    """The hooks of :func:`enable_gradient_release`.

    Args:
        optimizer: a :class:`prodigy_fused.Prodigy`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._owner = weakref.ref(optimizer)  # a parameter does not keep its optimizer alive
        self._hooks: dict[int, Any] = {}  # by their number, which the parameter has, too
        self._take_up([p for p in _parameters(optimizer) if p.requires_grad])
        self._after_step = optimizer.register_step_post_hook(self._free_others)

    def _take_up(self, params: list[Any]) -> None:
        check_gradients_are_final(params)
        hooks = [p.register_post_accumulate_grad_hook(self._step_and_free) for p in params]
        self._hooks |= {hook.id: hook for hook in hooks}

    def _step_and_free(self, p: Tensor) -> None:
        optimizer = self._owner()
        if optimizer is not None:
            try:
                optimizer.step_parameter(p)
            finally:
                p.grad = None  # also after an error, or the next gradient would be added to it

    def _free_others(self, optimizer: Any, *_: Any) -> None:
        """Frees the gradients that a step has found, and takes up their parameters: those of a group that was added,
        or that did not require a gradient before."""
        found = [p for p in _parameters(optimizer) if p.grad is not None]
        for p in found:
            p.grad = None
        new = [p for p in found if p.requires_grad and not self._has(p)]
        if new:  # to look at their gradients takes long
            self._take_up(new)

    def _has(self, p: Tensor) -> bool:
        return not self._hooks.keys().isdisjoint(getattr(p, "_post_accumulate_grad_hooks", None) or ())

    def remove(self) -> None:
        """Ends gradient release. A step that is open is ended by ``optimizer.step()``, as ever."""
        for hook in (*self._hooks.values(), self._after_step):
            hook.remove()
        self._hooks = {}


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def enable_gradient_release(optimizer: Any) -> GradientRelease:
    """Has every parameter stepped, and its gradient freed, as soon as ``backward`` has computed it.

    ``optimizer.step()`` ends the step, and every number is, bit for bit, that of the step without release (``foreach``
    on a CPU: to rounding). The gradients' memory then is that of the largest parameter's, not of all.

    What has no gradient yet, in a group that is added later or because it is frozen, is released from the step after
    its first one on; until then its gradient is freed by ``step()``. Not with gradient accumulation, clipping by the
    norm of all gradients, a gradient scaler, DistributedDataParallel (use FSDP2), or CUDA graphs; with ``betas[0] ==
    0`` the gradients are kept until the step.

    Args:
        optimizer: a :class:`prodigy_fused.Prodigy`.

    Returns:
        A handle, whose ``remove()`` ends it.

    Raises:
        TypeError: it is another optimizer.
        RuntimeError: the parameters are DistributedDataParallel's or FSDP1's.

    Example:
        >>> handle = prodigy_fused.enable_gradient_release(opt)
        >>> loss_fn(model(x), y).backward()  # steps every parameter
        >>> opt.step()  # updates d
    """
    if not hasattr(optimizer, "step_parameter"):
        raise TypeError(f"gradient release needs a prodigy_fused.Prodigy, not {type(optimizer).__name__}")
    return GradientRelease(optimizer)


def check_gradients_are_final(params: list[Tensor]) -> None:
    """Raises ``RuntimeError`` if DistributedDataParallel or FSDP1 will change gradients after the hooks were called."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if any(hasattr(p, "_fsdp_flattened") for p in params):
        raise RuntimeError(
            "gradient release steps a parameter before FSDP1 has reduced its gradient: use FSDP2 "
            "(torch.distributed.fsdp.fully_shard), or do without gradient release"
        )
    ours = {*map(id, params)}
    ddp = torch.nn.parallel.DistributedDataParallel
    # A parameter does not lead to it, but it is alive.
    for module in [found for found in gc.get_objects() if issubclass(type(found), ddp)]:
        if not ours.isdisjoint(map(id, module.parameters())):
            raise RuntimeError(
                "gradient release steps a parameter before DistributedDataParallel has averaged its gradient: use "
                "FSDP2 (torch.distributed.fsdp.fully_shard), or do without gradient release"
            )


_in_backward: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers of one parameter that backward has stepped


def warn_if_one_for_each(optimizer: Any) -> None:
    """Warns, once, where backward steps several optimizers of one parameter each: each follows a d of its own."""
    if torch._C._current_graph_task_id() == -1 or len(_in_backward) > 1:  # not in backward; has been said
        return
    if sum(len(group["params"]) for group in optimizer.param_groups) > 1:
        return
    _in_backward.add(optimizer)
    if len(_in_backward) > 1:
        warnings.warn(
            "backward steps a Prodigy optimizer for each parameter: each follows an estimate d of its own, and they "
            "are far apart; construct one for all parameters, and call enable_gradient_release(optimizer)",
            stacklevel=3,
        )
