"""What the optimizers of this folder have in common: arguments, gradients, steps that happen wholly or not at all,
checkpoints. What a step computes is in :meth:`Base._take`, of each optimizer.

The estimate is Python numbers in every parameter group, ``group["estimates"]``: a list of one dictionary, or of one per
parameter. Vectors are in ``state[p]``. A step computes new ones and binds them at its end, so what ``state_dict()``
returned is not written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..checkpoint import Verbatim
from ..options import Group, number
from ..plans import parameters
from ..tensors import check_gradient, check_parameter, describe

Numbers = dict[str, float]
# Squares of estimates, times squares of gradients, are summed: far beyond, they leave the range of float64.
LEAST, MOST = 1e-100, 1e100


class Option(NamedTuple):
    """What an argument may be; ``shared`` ones must be the same in all groups."""

    wanted: str
    valid: Callable[[Any], bool]
    shared: bool = True


DISTANCE = Option(f"a number from {LEAST:g} to {MOST:g}", lambda value: LEAST <= number(value) <= MOST)
BOUND = Option(f"a number from 0 to {MOST:g}", lambda value: 0 <= number(value) <= MOST)


class Base(torch.optim.Optimizer):
    """An optimizer with one estimate over all parameters of all groups.

    Args:
        params: the parameters, or groups of them, of dtype float64, float32, bfloat16 or float16.
        options: the arguments of the optimizer by name, each in ``OPTIONS``.

    Raises:
        ValueError: an argument out of range, or different in two groups; a parameter that is no leaf, has no memory or
            shape yet, or is there twice.
        TypeError: a parameter that is complex, or not floating point.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {}
    NUMBERS: ClassVar[tuple[str, ...]] = ("d", "d_hat", "k")  # of an estimate
    VECTORS: ClassVar[tuple[str, ...]] = ()  # of each parameter's state, in its shape
    LAYERWISE: ClassVar[bool] = False  # each parameter has an estimate of its own

    def __init__(self, params: Any, options: Group) -> None:
        self._check_options(options)
        super().__init__(params, {**self._plain(options), "method": type(self).__name__})

    def add_param_group(self, param_group: Group) -> None:
        """Adds parameters, which join the estimate; they start where they are at the next step.

        Raises:
            ValueError, TypeError: as in the constructor; nothing has been added then.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])  # may be a generator
            self._check_new(param_group["params"])
        options = self._plain({name: {**self.defaults, **param_group}[name] for name in self.OPTIONS})
        self._check_groups([*self.param_groups, options])
        estimates = self.param_groups[0]["estimates"] if self.param_groups else []
        method = type(self).__name__
        param_group.update({**options, "estimates": estimates, "method": method})
        super().add_param_group(param_group)

    def _check_options(self, group: Group) -> None:
        for name, option in self.OPTIONS.items():
            if not option.valid(group[name]):
                raise ValueError(f"Invalid {name}: {group[name]!r}: must be {option.wanted}")

    def _check_groups(self, groups: list[Group]) -> None:
        for index, group in enumerate(groups):
            self._check_options(group)
            for name, option in self.OPTIONS.items():
                first, own = groups[0][name], group[name]
                if option.shared and first != own:
                    message = f"parameter groups 0 and {index} disagree on {name} ({first} and {own})"
                    raise ValueError(f"{message}: they share one estimate, and must share it")

    def _plain(self, options: Group) -> Group:
        """Returns the options as Python's own numbers, which NumPy's are not, and tuples."""
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return {name: value if math.isnan(number(value)) else number(value) for name, value in tuples.items()}

    def _check_new(self, params: list[Any]) -> None:
        known = {id(p): i for i, p in enumerate(parameters(self.param_groups))}
        for index, p in enumerate(params, start=len(known)):
            p = p[1] if isinstance(p, tuple) else p
            if not isinstance(p, Tensor):
                raise TypeError(f"parameter {index} is a {type(p).__name__}: an optimizer needs tensors")
            if id(p) in known:
                raise ValueError(f"{describe(index, p)} is a duplicate of parameter {known[id(p)]}")
            known[id(p)] = index
            if is_lazy(p):
                raise ValueError(f"parameter {index} has no shape yet: run the model once before")
            check_parameter(index, p)
            if not (p.is_leaf or p.retains_grad):
                raise ValueError(f"{describe(index, p)} is not a leaf: optimize the tensor it was computed from")

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, wholly or, if it raises, not at all. Without any gradient there is no step. Waits for the
        device.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient that is not finite, or of another shape, dtype or device than its parameter (index
                and shape are named); an option in ``param_groups`` that is out of range, or
                different in two groups.
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups(self.param_groups)
        params = parameters(self.param_groups)
        for index, p in enumerate(params):
            if p.grad is not None:
                check_gradient(index, p, p.grad)
            if p in self.state and self.state[p][self.VECTORS[0]].shape != p.shape:
                before = tuple(self.state[p][self.VECTORS[0]].shape)
                raise ValueError(f"{describe(index, p)} had shape {before} at the last step")
        if any(p.grad is not None for p in params):
            self._take(params, loss)
        return loss

    def _take(self, params: list[Tensor], loss: Any) -> None:
        """Computes a step from ``p.grad``, in which only sums may still be found bad, and only then changes anything.

        Raises:
            ValueError: a sum that is not finite, by :meth:`_check_finite`.
        """
        raise NotImplementedError

    def _check_finite(self, params: list[Tensor], *sums: float) -> None:
        """Raises ``ValueError`` if a sum is not finite, and finds the gradient which made it so."""
        if all(map(math.isfinite, sums)):
            return
        for index, p in enumerate(params):
            if p.grad is not None and not p.grad.isfinite().all():
                raise ValueError(f"the gradient of {describe(index, p)} is not finite")
        raise ValueError("a sum over all parameters is not finite: the gradients, or the parameters, are too large")

    def _publish(self, estimates: list[Numbers]) -> None:
        for group in self.param_groups:
            group["estimates"] = estimates

    # -- read-only properties -----------------------------------------------------------------------------------------

    def _numbers(self) -> list[Numbers]:
        """Returns the numbers of each estimate as they are now, also before the first step."""
        raise NotImplementedError

    @property
    def d(self) -> float:
        """The estimate of ``|x0 - x*|``, the distance from the start to a solution, in the parameters' unit."""
        return math.hypot(*(numbers["d"] for numbers in self._numbers()))

    @property
    def d_hat(self) -> float:
        """The last estimate by itself: ``d`` is the largest so far."""
        d_hats = [numbers["d_hat"] for numbers in self._numbers()]
        return math.hypot(*d_hats) if self.LAYERWISE else d_hats[0]

    @property
    def step_count(self) -> int:
        """The number of steps so far."""
        return int(max(numbers["k"] for numbers in self._numbers()))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what ``state_dict()`` of the same class returned, on any device; the arguments are the
        checkpoint's, but for functions, which are not in it.

        Raises:
            ValueError: another method's dictionary, missing keys, wrong shapes, an argument or number out of range;
                nothing has been changed then.
        """
        # Registered last, so that user hooks see the dictionary first.
        last = self.register_load_state_dict_pre_hook(lambda _, saved: self._imported(saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()

    def _imported(self, saved: dict[str, Any]) -> dict[str, Any]:
        for part in ("state", "param_groups"):
            if part not in saved:
                raise ValueError(f"the state dict has no {part!r}: it is not an optimizer's")
        groups, states = saved["param_groups"], dict(saved["state"])
        counts = [[len(group["params"]) for group in each] for each in (self.param_groups, groups)]
        if counts[0] != counts[1]:
            raise ValueError(f"the optimizer's groups have {counts[0]} parameters, the state dict's {counts[1]}")
        for index, group in enumerate(groups):
            self._check_saved_group(f"param_groups[{index}] of the state dict", group)
        if any(group["estimates"] != groups[0]["estimates"] for group in groups):
            raise ValueError("the groups of the state dict disagree on 'estimates'")
        started = bool(groups and groups[0]["estimates"])
        numbered = [key for group in groups for key in group["params"]]
        for index, (p, key) in enumerate(zip(parameters(self.param_groups), numbered, strict=True)):
            if key in states:
                states[key] = Verbatim(self._imported_state(describe(index, p), p, states[key]))
            elif started and self._needs_state():
                raise ValueError(f"the state dict has no state of {describe(index, p)}")
        return {**saved, "state": states}

    def _check_saved_group(self, where: str, group: Group) -> None:
        missing = [name for name in ("method", "estimates", *self.OPTIONS) if name not in group]
        if missing:
            raise ValueError(f"{where} lacks {missing}: not a checkpoint of {type(self).__name__}")
        if group["method"] != type(self).__name__:
            raise ValueError(f"{where} is of method {group['method']!r}, this optimizer is {type(self).__name__}")
        self._check_options(group)
        for numbers in group["estimates"]:
            lacking = [name for name in self.NUMBERS if name not in numbers]
            bad = {name: value for name, value in numbers.items() if not math.isfinite(number(value))}
            if lacking or bad or numbers["d"] < 0:
                raise ValueError(f"the estimate in {where} is corrupt: {numbers} lacks {lacking}, or is out of range")

    def _imported_state(self, what: str, p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        for name in self.VECTORS:
            shape = tuple(saved[name].shape) if isinstance(saved.get(name), Tensor) else None
            if shape != tuple(p.shape):
                raise ValueError(f"the saved {name} of {what} has shape {shape}")
        return {name: saved[name].to(p.device) for name in self.VECTORS}

    def _needs_state(self) -> bool:
        """Returns whether after a step every parameter has a state, also one that had no gradient."""
        return True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the end of load_state_dict, and of unpickling and deepcopy
        for p, value in self.state.items():
            if isinstance(value, Verbatim):
                self.state[p] = value.state
