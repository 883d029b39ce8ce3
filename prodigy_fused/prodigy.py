"""The optimizer: arguments, parameter groups and checkpoints. runtime.py takes its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, checkpoint, hyper, options
from .estimate import FIELDS, initial
from .groups import check_new, with_its_own_choice
from .options import OPTIONS, Group
from .readings import Readings
from .release import warn_if_one_for_each
from .runtime import Runtime
from .sharding import LOST, Span, holds_plain_parts


class Prodigy(Readings, Optimizer):
    r"""Adam with step sizes estimated by Prodigy (Mishchenko & Defazio, arXiv 2306.06101, Algorithm 4).

    A drop-in for ``prodigyopt.Prodigy`` 1.1.2: same arguments, same checkpoints, same numbers. Leave ``lr`` at 1, or
    let a scheduler change it; ``d * lr`` is what Adam would call the learning rate.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: factor of the estimated step size, a number or a one-element tensor; may be 0 and may differ between groups.
        betas: decay rates of the running averages of the gradient and its square. ``beta1 = 0`` keeps no ``exp_avg``.
        beta3: decay rate of ``s`` and of the numerator of the estimate; None: ``sqrt(beta2)``.
        eps: added, times d, to the denominator.
        weight_decay: decoupled as in AdamW, or an L2 penalty with ``decouple=False``.
        decouple: True: decoupled weight decay; False: an L2 penalty.
        use_bias_correction: Adam's bias correction.
        safeguard_warmup: keeps ``lr`` out of the denominator of the estimate, for long warm-ups.
        d0: the first estimate of d; at least 2**-126 / eps.
        d_coef: factor of the estimate; the preferred way to tune the method (0.5 or 2).
        growth_rate: upper bound on d_new / d per step, but for the first growth; inf: unbounded. Forks' d_limiter is
            2 ** 0.25.
        fsdp_in_use: the (plain) tensors of this group are other tensors, or other parts of them, on each rank; for
            shards cut by hand and ZeroRedundancyOptimizer. Of no effect on DTensors, and without a process group.
        slice_p: estimate d from every p-th element only, which saves memory; 11 is reasonable. Take an odd number that
            has no factor in common with the last dimensions of the matrices: otherwise whole columns are left out.
        d_limit: upper bound on d, which otherwise never falls again; inf: unbounded.
        split_groups: each parameter group has an estimate of its own, exactly as with one optimizer per group. ``d0``,
            ``d_coef``, ``growth_rate``, ``beta3``, ``d_limit`` and ``prodigy_steps`` may then differ between groups.
        prodigy_steps: after so many steps d stays as it is, and ``s`` and ``p0`` are freed; 0: never.
        foreach: True: the ``torch._foreach`` backend; False: a loop over tensors.
        fused: True: a compiled backend, or RuntimeError with the reason; False: never one; None: where there is one.
        maximize: maximize the objective.
        capturable: steps may be captured in a CUDA graph: take one before the capture, make ``lr`` a tensor on the
            device if it is to change between replays, and capture anew after whatever replaces tensors
            (``load_state_dict``, a new group, a first gradient). Of no effect on the CPU.
        state_dtype: dtype of exp_avg, exp_avg_sq and s: float32, bfloat16 (as a word or a ``torch.dtype``), or None
            for the parameter's, as the reference has it; or "8bit", which keeps the start in 8 bits, too. The state of
            a float64 parameter is always float64.
        min_8bit_size: with "8bit", tensors of fewer elements (of a DTensor, on this rank) have a state of float32.
        low_precision: how bfloat16 and float16 parameters are rounded: "stochastic", "24bit" (of bfloat16, keeps 8
            more bits of each weight in a byte), "displacement" (as accurate as float32 master weights; needs one more
            float32 tensor, and slice_p=1) or "nearest" (as the reference: most parameters never move). None:
            "24bit" for bfloat16; for float16 "displacement", or "stochastic" with slice_p > 1 or 8-bit state.
        backend: the name of a backend, for tests and benchmarks; never falls back.
        process_group: the ranks that share the estimate, a ProcessGroup or a DeviceMesh, where parameters do not tell
            (a pipeline's stages). None: those of the DTensors' meshes, or all, with FSDP1 or ``fsdp_in_use``.

    Raises:
        ValueError: a hyper-parameter out of range or NaN, a conflict between groups, no or duplicate parameters, a
            sparse or expanded parameter.
        TypeError: a complex or integer parameter that is not a frozen ``nn.Parameter``.
        RuntimeError: ``fused=True`` or ``backend`` cannot take a parameter.

    Example:
        >>> opt = Prodigy(model.parameters(), weight_decay=0.01, fused=True)
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()
    """

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
        d_limit: float = float("inf"),
        split_groups: bool = False,
        prodigy_steps: int = 0,
        capturable: bool = False,
        state_dtype: str | torch.dtype | None = "float32",
        min_8bit_size: int = 4096,
        low_precision: str | None = None,
        backend: str | None = None,
        process_group: Any = None,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in OPTIONS}
        options.check(defaults)
        backends.check_choice(defaults)
        if isinstance(params, (set, frozenset)):
            raise TypeError("params is a set: its order, hence that of a checkpoint, is not reproducible; give a list")
        self._runtime = Runtime(Span(process_group))
        self._is_constructed = self._step_supports_amp_scaling = False
        super().__init__(params, {**options.stored(defaults), **initial(float(d0))})
        self._is_constructed = True
        self._declare_amp_support()

    # -- parameters and groups ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time; it joins the running estimate, whose options it has unless it says otherwise.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor, before anything is changed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if not isinstance(param_group["params"], (Tensor, set, list)):  # a generator, for example
            param_group["params"] = list(param_group["params"])
        self._runtime.check_closed("a new group")
        first = self.param_groups[0] if self.param_groups else None
        own = {**self._inherited(), **with_its_own_choice(param_group)}
        merged = {**self.defaults, **own}
        options.check(merged)
        backends.check_choice(merged)
        merged.update(options.stored(merged))
        if first is not None:
            hyper.check_shared(first, len(self.param_groups), {"frozen": first["frozen"], **merged})
        check_new(self.param_groups, merged)
        running = {**initial(float(merged["d0"])), "frozen": False, **own}
        if first is not None and not merged["split_groups"]:
            running = first  # starts where the others are
        plain = {name: merged[name] for name in OPTIONS if name in own}
        # The caller's own dictionary becomes the group, as torch has it.
        param_group.update({**plain, **{name: running[name] for name in (*FIELDS, "frozen")}})
        super().add_param_group(param_group)
        self._runtime.forget_plans()
        self._step_supports_amp_scaling &= not holds_plain_parts(param_group)

    def _inherited(self) -> Group:
        """Returns what a new group has from the others: what they agree on now may have been written, or loaded, since
        the optimizer was constructed."""
        if not self.param_groups:
            return {}
        first = self.param_groups[0]
        shared = hyper.SHARED if self._is_constructed and not first["split_groups"] else ()
        return {name: first[name] for name in (*hyper.COMMON, *shared)}

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; parameters without a gradient, and groups with lr 0, are left alone.

        Everything is checked before anything is changed. ``self.grad_scale`` and ``self.found_inf`` (0-dim tensors,
        set by ``torch.amp.GradScaler``, or by you) unscale the gradients and skip the step.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a bad gradient, hyper-parameter, ``grad_scale`` or ``found_inf``; parameters that share memory.
            RuntimeError: a sparse gradient, or another thread is in ``step()``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        warn_if_one_for_each(self)
        scalars = self._scalars()
        for name, value in scalars.items():
            options.check_scalar(name, value)
        self._runtime.step(self.param_groups, self.state, **scalars)
        return loss

    def _scalars(self) -> dict[str, Any]:
        return {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: Any = None, i: Any = None) -> None:
        """Steps one parameter whose gradient is there, so that it can be freed before the others are: gradient release,
        for trainers with hooks of their own (:func:`prodigy_fused.enable_gradient_release` has them for all others).

        ``step()`` ends the step, and updates d: with the same bits as a step of all gradients at once.

        Args:
            p: the parameter; nothing is done if it has no gradient.
            group, i: as trainers pass them (the parameter's group, and its place there); not needed.

        Raises:
            ValueError: a bad gradient, or not a parameter of this optimizer; nothing has been changed then.
            RuntimeError: a second gradient before ``step()``, a gradient scaler, DistributedDataParallel, a CUDA graph.
        """
        scaled = any(value is not None for value in self._scalars().values())
        self._runtime.take(self.param_groups, self.state, p, scaled)

    def supports_fused_back_pass(self) -> bool:
        """Returns True: trainers ask whether there is :meth:`step_parameter`."""
        return True

    # -- ranks ---------------------------------------------------------------------------------------------------------

    @property
    def process_group(self) -> Any:
        """The ranks that share the estimate, if they were given."""
        return self._runtime.span.given

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self._runtime.check_closed("a new process group")
        self._runtime = Runtime(Span(process_group), self._runtime.captured())
        self._declare_amp_support()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in the format of ``prodigyopt.Prodigy`` 1.1.2, which can load it.

        Shares tensors with the optimizer where no conversion is needed, as torch's does; clone what must not change.
        """
        return self._exported(compact=False)

    def compact_state_dict(self) -> dict[str, Any]:
        """Returns the state with 8-bit tensors as they are (``state_dtype="8bit"``), a quarter of what
        :meth:`state_dict` gives for them; :meth:`load_state_dict` takes both, ``prodigyopt`` only the latter. (State of
        DTensors is as in ``state_dict``, so that it can move to other meshes.)

        Shares tensors with the optimizer; clone what must not change.
        """
        return self._exported(compact=True)

    def _exported(self, compact: bool) -> dict[str, Any]:
        # Run first, so that user hooks see the reference's format.
        self._runtime.check_closed("state_dict()")
        checkpoint.check_owners(self)
        first = self.register_state_dict_post_hook(partial(checkpoint.export, compact=compact), prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint of this class or of ``prodigyopt.Prodigy`` 1.0 to 1.1.2, on any device.

        ``foreach``, ``fused``, ``capturable`` and ``backend`` stay as constructed; all other options are the
        checkpoint's, ``low_precision`` and ``state_dtype`` too, where it has them: to change one, set it in
        ``param_groups`` afterwards.

        Raises:
            ValueError: missing keys, wrong shapes, another slice_p, a NaN estimate; nothing has been changed then.
        """
        groups = self.param_groups  # and registered last, so that user hooks see the state dict first
        last = self.register_load_state_dict_pre_hook(lambda _, saved: checkpoint.import_(groups, saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()

    def __getstate__(self) -> dict[str, Any]:  # of a process group nothing can be copied
        self._runtime.check_closed("a copy")
        return {**super().__getstate__(), "_has_process_group": self.process_group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        lost = state.get("_has_process_group", False)
        for p, value in state["state"].items():
            if isinstance(value, checkpoint.Verbatim):
                state["state"][p] = value.state
        super().__setstate__(state)  # also the end of load_state_dict, and of unpickling and deepcopy
        self.defaults = {**options.defaults(), **self.defaults}  # if an older version has pickled it
        for group in self.param_groups:
            group.update({**options.defaults(), **initial(group["d"]), "frozen": False, **group})
        former: Runtime | None = vars(self).get("_runtime")
        span = former.span if former is not None else Span(LOST if lost else None)
        self._runtime = Runtime(span, former.captured() if former is not None else None)
        self._is_constructed = True
        self._declare_amp_support()

    def _declare_amp_support(self) -> None:
        # With fused=True GradScaler leaves unscaling and skipping to step(), as with torch's own fused optimizers. Not
        # with plain parts: each rank's scaler would look for infinities in its own, and the scales would drift apart.
        whole = self.process_group is None and not any(map(holds_plain_parts, self.param_groups))
        self._step_supports_amp_scaling = self.defaults["fused"] is True and whole
