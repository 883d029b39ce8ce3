"""The optimizer: arguments, state and the order of a step. The arithmetic is in the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import backends, checkpoint, hyper
from .estimate import FIELDS, Estimate, advance, changes, initial
from .low_precision import PATIENCE, warn_if_stuck
from .plans import Plans, parameters
from .step import Step
from .tensors import check_parameter, describe


class Prodigy(Optimizer):
    r"""Adam with step sizes estimated by Prodigy (Mishchenko & Defazio, arXiv 2306.06101, Algorithm 4).

    A drop-in for ``prodigyopt.Prodigy`` 1.1.2: same arguments, same checkpoints, same numbers. Leave ``lr`` at 1, or
    let a scheduler change it; ``d * lr`` is what Adam would call the learning rate.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: factor of the estimated step size, a number or a one-element tensor; may be 0 and may differ between groups.
        betas: decay of the averages of the gradient and of its square. ``beta1 = 0`` keeps no ``exp_avg``.
        beta3: decay of ``s`` and of the numerator of the estimate; None: ``sqrt(beta2)``.
        eps: added, times d, to the denominator.
        weight_decay: decoupled as in AdamW, or an L2 penalty with ``decouple=False``.
        decouple: which of the two.
        use_bias_correction: Adam's bias correction.
        safeguard_warmup: keeps ``lr`` out of the denominator of the estimate, for long warm-ups.
        d0: the first estimate of d.
        d_coef: factor of the estimate; the preferred way to tune the method (0.5 or 2).
        growth_rate: most that d may grow by in a step, a factor; inf: unrestricted.
        fsdp_in_use: sum the estimate's two sums over the ranks of ``torch.distributed``'s default group; for
            parameters that are sharded and not replicated. Without a process group there is nothing to sum.
        slice_p: estimate d from every p-th element only, which saves memory; 11 is reasonable.
        foreach: True: the ``torch._foreach`` backend; False: a loop over tensors.
        fused: True: a compiled backend, or RuntimeError with the reason; False: never one; None: where there is one.
        maximize: maximize the objective.
        capturable: steps may be captured in a CUDA graph: take one before the capture, make ``lr`` a tensor on the
            device if it is to change between replays, and capture anew after whatever replaces tensors
            (``load_state_dict``, a new group, a first gradient). Of no effect on the CPU.
        state_dtype: dtype of exp_avg, exp_avg_sq and s: float32, bfloat16, or None for the parameter's, as the
            reference has it. The state of a float64 parameter is always float64.
        low_precision: how bfloat16 and float16 parameters are rounded: "stochastic", "displacement" (as accurate as
            float32 master weights; needs a float32 tensor more, and slice_p=1) or "nearest" (the reference's way: most
            never move). None: "stochastic" for bfloat16, "displacement" for float16, or "stochastic" with slice_p > 1.
        backend: the name of a backend, for tests and benchmarks; never falls back.

    Raises:
        ValueError: a hyper-parameter out of range or NaN, a conflict between groups, no or duplicate parameters, a
            sparse, meta or expanded parameter.
        TypeError: a complex or integer parameter.
        RuntimeError: ``fused=True`` or ``backend`` cannot take a parameter.

    Example:
        >>> opt = Prodigy(model.parameters(), weight_decay=0.01, fused=True)
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()
        >>> opt.d
    """

    # Rebuilt when needed: neither copied, nor pickled, nor saved.
    _plans: Plans | None = None
    _estimate: Estimate | None = None
    _settings: list[Any] | None = None
    _layouts: list[Any] | None = None
    _shared: hyper.Shared
    _stepping = False
    _watched = 0  # steps

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | None = torch.float32,
        low_precision: str | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        hyper.check(defaults)
        backends.check_choice(defaults)
        if isinstance(params, (set, frozenset)):
            raise TypeError("params is a set: its order, hence that of a checkpoint, is not reproducible; give a list")
        super().__init__(params, {**defaults, **initial(float(d0))})
        self._take_over_amp()

    # -- parameters and groups ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time; it joins the running estimate.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor, before anything is changed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])  # may be a generator
        merged = {**self.defaults, **group}
        hyper.check(merged)
        backends.check_choice(merged)
        if self.param_groups:
            hyper.check_shared(hyper.shared_of(self.param_groups[:1]), len(self.param_groups), merged)
        self._check_new(merged)
        # The estimate is common: a late group starts where the others are.
        running = self.param_groups[0] if self.param_groups else {**initial(float(merged["d0"])), **group}
        super().add_param_group({**group, **{name: running[name] for name in FIELDS}})
        self._plans = None

    def _check_new(self, group: dict[str, Any]) -> None:
        known = {id(p): i for i, p in enumerate(parameters(self.param_groups))}
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        for index, p in enumerate(params, start=len(known)):
            p = p[1] if isinstance(p, tuple) else p
            if not isinstance(p, Tensor):
                raise TypeError(f"parameter {index} is a {type(p).__name__}: Prodigy optimizes tensors")
            if id(p) in known:
                raise ValueError(f"{describe(index, p)} is a duplicate of parameter {known[id(p)]}")
            known[id(p)] = index
            check_parameter(index, p)
            if not (p.is_leaf or p.retains_grad):
                raise ValueError(f"{describe(index, p)} is not a leaf: optimize the tensor it was computed from")
            if not is_lazy(p):
                backends.choose(p, group)

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient, and groups with lr 0, are left alone.

        Everything is checked before anything is changed. ``self.grad_scale`` and ``self.found_inf`` (0-dim tensors,
        set by ``torch.amp.GradScaler``, or by you) unscale the gradients and skip the step.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a bad gradient, hyper-parameter, ``grad_scale`` or ``found_inf``; parameters that share memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        hyper.check_scalar("found_inf", found_inf)
        hyper.check_scalar("grad_scale", getattr(self, "grad_scale", None))
        if found_inf is None or hyper.on_device(found_inf) or not found_inf:
            self._step_alone()
        return loss

    def _step_alone(self) -> None:
        if self._stepping:
            raise RuntimeError("this optimizer's step() is running in another thread")
        self._stepping = True
        try:
            self._take_step()
        finally:
            self._stepping = False

    @torch._disable_dynamo  # type: ignore[attr-defined] # in a compiled function a step runs as it is
    def _take_step(self) -> None:
        groups = self.param_groups
        hypers = self._hypers()
        changes(groups, self._estimate.published if self._estimate else {})  # raises before anything is changed
        plans = self._current_plans()
        work = plans.work(groups)
        step_on_device = bool(work) and all(plan.reads_device for plan, _ in work)
        if self._estimate is None or self._estimate.row.device != plans.device:
            self._estimate = Estimate(plans.device)
        self._estimate.pull(groups)
        step = Step(hypers, self._shared, self._estimate.row)
        if not self._take_scalars(step, step_on_device):
            return

        for plan, grads in work:
            plan.update(grads, step.to(plan.sums.device))
        step.sums = _add([plan.sums for plan, _ in work], plans.device)
        if plans.sharded and dist.is_initialized():
            dist.all_reduce(step.sums)
        near = step
        for i, (plan, grads) in enumerate(work):
            near = step.to(plan.sums.device)
            plan.finish(grads, near, last=i == len(work) - 1)
        if near.row is not step.row:  # the last plan is on another device than the first
            step.row.copy_(near.row)
        if not work:  # a rank without gradients follows the others
            step.row.copy_(advance(step.row, step.sums, step.shared))
        self._estimate.publish(groups)
        if any(h.lr for h in hypers):
            self._watch(plans)

    def _watch(self, plans: Plans) -> None:
        # Not in every step, and never in a capture: it waits for the device.
        if self._watched < PATIENCE and not plans.capturing():
            self._watched += 1
            if self._watched == PATIENCE:
                warn_if_stuck(plans.slots)

    def _take_scalars(self, step: Step, on_device: bool) -> bool:
        """Gives ``step`` what may be on the device, read or, if ``on_device``, as it is; False: skip the step."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        lrs = [group["lr"] if hyper.on_device(group["lr"]) else None for group in self.param_groups]
        if on_device:
            step.lrs = lrs
            step.device_scale = grad_scale if hyper.on_device(grad_scale) else None
            step.found_inf = found_inf if hyper.on_device(found_inf) else None
        elif found_inf is not None and found_inf:
            return False
        elif any(lr is not None for lr in lrs):
            step.hypers = [hyper.hyper_of(group) for group in self.param_groups]
        if grad_scale is not None and step.device_scale is None:
            step.grad_scale = float(grad_scale)
        return True

    def _hypers(self) -> list[hyper.Hyper]:
        settings = [hyper.settings_of(group) for group in self.param_groups]
        if settings != self._settings:
            for group in self.param_groups:
                hyper.check(group)
                backends.check_choice(group)
            self._shared = hyper.shared_of(self.param_groups)
            layouts = [hyper.layout_of(group) for group in self.param_groups]
            if layouts != self._layouts:
                self._plans = None
            self._settings, self._layouts = settings, layouts
        return [hyper.hyper_of(group, wait=False) for group in self.param_groups]

    def _current_plans(self) -> Plans:
        """The plans, built anew where anything they were built for was swapped."""
        if self._plans is None or not self._plans.fit(self.param_groups, self.state):
            self._plans = None
            self._plans = Plans(self.param_groups, self.state)
        return self._plans

    # -- to look at ---------------------------------------------------------------------------------------------------

    @property
    def d(self) -> float:
        """The estimate of the distance to the solution; ``d * lr`` is the step size. Waits for the device."""
        return float(self.param_groups[0]["d"])

    @property
    def d0(self) -> float:
        """The first estimate."""
        return float(self.param_groups[0]["d0"])

    @property
    def step_count(self) -> int:
        """Steps taken so far, those before the first non-zero gradient not counted."""
        return int(self.param_groups[0]["k"])

    @property
    def nonfinite_steps(self) -> int:
        """Steps whose sums were not finite, which left the estimate as it was."""
        return int(self.param_groups[0]["nonfinite_steps"])

    @property
    def corrections(self) -> int:
        """Steps in which d moved, the only ones that need a second pass over the parameters."""
        return int(self.param_groups[0]["corrections"])

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state in the format of ``prodigyopt.Prodigy`` 1.1.2, which can load it.

        It refers to the optimizer's own tensors where their format allows, as torch's: copy what should not change.
        """
        # Run first, so that a user's own hooks see the reference's format.
        first = self.register_state_dict_post_hook(lambda _, saved: checkpoint.export(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint of this class or of ``prodigyopt.Prodigy`` 1.1.2, on any device or backend.

        ``foreach``, ``fused``, ``capturable`` and ``backend`` stay as constructed; all other options are the
        checkpoint's, ``low_precision`` and ``state_dtype`` too, where it has them: to change one, set it in
        ``param_groups`` afterwards.

        Raises:
            ValueError: missing keys, wrong shapes, another slice_p, a NaN estimate; nothing has been changed then.
        """
        # Registered last, so that a user's own hooks have had their say.
        last = self.register_load_state_dict_pre_hook(lambda _, saved: checkpoint.admit(self.param_groups, saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the end of load_state_dict, and of unpickling and deepcopy
        for p, value in self.state.items():
            if isinstance(value, checkpoint.Verbatim):
                self.state[p] = value.state
        self._plans = self._estimate = self._settings = None
        self._take_over_amp()

    def _take_over_amp(self) -> None:
        # With fused=True GradScaler leaves unscaling and skipping to step(), as with torch's own fused optimizers.
        self._step_supports_amp_scaling = self.defaults["fused"] is True


def _add(sums: list[Tensor], device: torch.device) -> Tensor:
    if len(sums) == 1:
        return sums[0]
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for pair in sums:
        total += pair.to(device, non_blocking=device.type != "cpu")
    return total
