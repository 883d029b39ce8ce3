"""The order of one step: options, plans, agree, load, update, gather, finish, publish."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import options, state
from .backends.gpu import capturing
from .estimate import Estimates, Published, all_changes, members, same_changes
from .groups import check_all_are_stepped
from .hyper import Hyper
from .inference import outside_inference_mode
from .low_precision import STUCK_AFTER_STEPS, warn_if_stuck
from .nonfinite import NonfiniteWatch
from .open_step import OpenStep, not_ours
from .options import Group
from .plans import PlanSet, parameters
from .release import SCALED, check_gradients_are_final
from .scalars import scalars_of
from .settings import Settings
from .sharding import Span
from .step import Step
from .tensors import check_gradient, is_fake


class Runtime:
    """Takes the steps of one optimizer.

    Holds only what can be rebuilt on demand: an optimizer neither copies, pickles nor saves it.
    """

    def __init__(self, span: Span, captured: list[Any] | None = None) -> None:
        """Args:
        span: the ranks that share the estimates.
        captured: of a former runtime of the same optimizer.
        """
        self.span = span
        self._stepped: list[Tensor] = []  # the parameters of the last step
        self.plans: PlanSet | None = None
        self._captured = captured or []  # what CUDA graphs read and write of plans that are no more
        self._estimates: Estimates | None = None
        self._most_steps: list[int] | None = None  # of each estimate, an upper bound of k
        self._settings = Settings()
        self._last: Step | None = None  # for its record, which the next step may take over
        self._lock = threading.Lock()
        self._open: tuple[_Begun, OpenStep] | None = None
        self._steps_watched = 0
        self._nonfinite: list[NonfiniteWatch] = []

    def forget_plans(self) -> None:
        """Has the plans built anew at the next step."""
        self._captured = self.captured()
        self.plans = None

    def captured(self) -> list[Any]:
        """Returns what CUDA graphs of this optimizer read and write: it has to live as long as they may be replayed."""
        return self._captured + (self.plans.captured() if self.plans is not None else [])

    @torch._disable_dynamo  # type: ignore[attr-defined] # in a compiled function a step runs as it is
    @outside_inference_mode
    def step(self, groups: list[Group], states: dict[Tensor, Any], grad_scale: Any, found_inf: Any) -> None:
        """Takes one step, or ends the one that is open. An error that a check finds changes nothing (docs/design.md,
        "If a step raises").

        Args:
            groups, states: the optimizer's ``param_groups`` and ``state``.
            grad_scale, found_inf: a number or a tensor of one element, or None if there is no scaler.

        Raises:
            RuntimeError: another thread is in this optimizer's step.
        """
        if self._lock.locked():
            raise RuntimeError("this optimizer's step() is running in another thread")
        with self._lock, self:  # acquire() may be interrupted just after it
            try:
                (self._step if self._open is None else self._close)(groups, states, grad_scale, found_inf)
            finally:
                if self.plans is not None:
                    self.plans.release_gradients()

    def __enter__(self) -> None:
        """Begins what an interrupt (Ctrl-C) may stop anywhere."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Forgets, after an interrupt, all that may be half done."""
        if kind is not None and not issubclass(kind, Exception):
            self._open = None
            self.forget_plans()
            self._settings.forget()

    def _step(self, groups: list[Group], states: dict[Tensor, Any], grad_scale: Any, found_inf: Any) -> None:
        begun = self._begin(groups, states, grad_scale, found_inf)
        if begun is not None:
            begun.step.sums = self.span.gather(begun.plans.update(begun.step))
            self._end(groups, begun)

    def _begin(
        self, groups: list[Group], states: dict[Tensor, Any], grad_scale: Any, found_inf: Any, opens: bool = False
    ) -> _Begun | None:
        """Returns what a step, whose gradients come one by one if it ``opens``, will do; None if it is skipped."""
        self._read_options(groups)
        ended = self._freeze(groups)
        try:
            if ended:
                self._read_options(groups)
            return self._prepare(groups, states, grad_scale, found_inf, opens)
        except Exception:
            if self.plans is None or not self.plans.has_changed_states:  # nothing has been given back
                self._set_frozen(ended, False)
            raise

    def _prepare(
        self, groups: list[Group], states: dict[Tensor, Any], grad_scale: Any, found_inf: Any, opens: bool
    ) -> _Begun | None:
        hypers, estimate_options = self._settings.hypers, self._settings.estimates
        written = all_changes(groups, self._estimates)
        plans = self._current_plans(groups, states, opens)
        if found_inf is not None:
            found_inf = self.span.agree(found_inf, plans.device)
        # The only place that decides a skip on the host. On a device the kernels do, and take part in all that follows.
        if not (plans.reads_device and options.on_device(found_inf)) and found_inf:
            self.span.gather(torch.zeros(plans.estimates, 2, dtype=torch.float64, device=plans.device))
            return None

        scalars = scalars_of(groups, plans.reads_device, hypers, grad_scale, found_inf)
        plans.build()
        if not opens:
            plans.load_gradients()
        estimates = self._current_estimates(groups, plans, written)
        rows = estimates.rows
        # In a captured graph every replay must find what the last one wrote, and so must the steps between replays.
        in_place = rows.is_cpu or plans.capturing() or self.captured()
        new_rows = rows if in_place else torch.empty_like(rows)
        step = Step(scalars.hypers, estimate_options, rows, new_rows, scalars.grad_scale, scalars.found_inf)
        if self._last is not None:
            step.take_record_of(self._last)
        self._last = step
        return _Begun(plans, step, hypers, estimates, written)

    def _end(self, groups: list[Group], begun: _Begun) -> None:
        """Takes phase 2, with the sums."""
        begun.plans.finish(begun.step)
        self._stepped = begun.plans.params
        begun.estimates.publish(groups, begun.step.new_rows)
        self._watch(begun.plans, begun.hypers)
        if begun.step.rows.is_cpu:
            self.look_for_nonfinite(groups)

    # -- gradients one by one ------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @outside_inference_mode
    def take(self, groups: list[Group], states: dict[Tensor, Any], p: Tensor, scaled: bool) -> None:
        """Updates one parameter with its gradient, see Note [Gradients one by one] in open_step.py. The first one opens
        the step. Autograd may call from several threads.

        Args:
            scaled: whether there is a gradient scaler.

        Raises:
            ValueError: not a parameter of this optimizer, or a bad gradient.
            RuntimeError: a scaler; a second gradient; gradients that are not final; a step in a CUDA graph.
        """
        grad = p.grad
        if grad is None:
            return
        with self._lock, self:
            if self._open is None:
                if scaled:
                    raise RuntimeError(SCALED)
                index = next((i for i, q in enumerate(parameters(groups)) if q is p), None)
                if index is None:
                    raise ValueError(not_ours(p))
                check_gradient(index, p, grad)
                if capturing(p.device):
                    raise RuntimeError("a step whose gradients are released cannot be captured in a CUDA graph")
                former = self.plans
                begun = self._begin(groups, states, None, None, opens=True)
                assert begun is not None
                if begun.plans is not former:
                    check_gradients_are_final(begun.plans.params)
                self._open = begun, OpenStep(begun.plans, begun.step, begun.hypers)
            self._open[1].take(p, grad)

    def _close(self, groups: list[Group], states: dict[Tensor, Any], grad_scale: Any, found_inf: Any) -> None:
        assert self._open is not None
        begun, gradients = self._open
        if grad_scale is not None or found_inf is not None:
            self._open = None  # nobody can take back what has been done
            raise RuntimeError(f"{SCALED}. The parameters have moved by scaled gradients: go on from a checkpoint")
        if not same_changes(all_changes(groups, begun.estimates), begun.written):
            raise RuntimeError("the estimate was written to in the middle of a step: do that after step()")
        begun.step.sums = self.span.gather(gradients.close(groups, states))
        self._open = None
        self._end(groups, begun)
        for p in gradients.without_gradients():
            state.remove(begun.plans.states, p)
            self.forget_plans()

    def check_closed(self, what: str) -> None:
        """Raises ``RuntimeError`` if some parameters have taken the current step, and others not."""
        if self._open is not None:
            raise RuntimeError(f"{what} in the middle of a step: some gradients have been released; call step() first")

    def look_for_nonfinite(self, groups: list[Group]) -> None:
        """Warns where the sums of many steps in a row were not finite. Waits for the device, so that for a GPU this is
        left to whoever reads the estimate."""
        estimates = members(groups)
        if len(self._nonfinite) != len(estimates):
            self._nonfinite = [NonfiniteWatch() for _ in estimates]
        if self.plans is None:
            return
        slots = self.plans.slots
        for e, (own, watch) in enumerate(zip(estimates, self._nonfinite, strict=True)):
            watch.look(int(own[0]["k"]), int(own[0]["nonfinite_steps"]), slots, e)

    def _freeze(self, groups: list[Group]) -> list[Group]:
        """Fixes the estimates that have taken their ``prodigy_steps``; returns their groups.

        Where k is on a device it is read, which waits, only once as many steps as that have been tried.
        """
        if not any(group["prodigy_steps"] for group in groups):
            self._most_steps = None
            return []
        estimates = members(groups)
        if self._most_steps is None or len(self._most_steps) != len(estimates):
            self._most_steps = [int(own[0]["k"]) for own in estimates]
        found: list[Group] = []
        for e, own in enumerate(estimates):
            limit, k = own[0]["prodigy_steps"], own[0]["k"]
            in_graph = isinstance(k, Tensor) and capturing(k.device)
            known = not isinstance(k, Tensor) or self._most_steps[e] >= limit
            if not own[0]["frozen"] and limit and not in_graph and known:
                self._most_steps[e] = int(k)
                if self._most_steps[e] >= limit:
                    found += own
            self._most_steps[e] += 1
        self._set_frozen(found, True)
        return found

    def _set_frozen(self, groups: list[Group], frozen: bool) -> None:
        for group in groups:
            group["frozen"] = frozen
            self.forget_plans()
            self._settings.forget()

    def _read_options(self, groups: list[Group]) -> None:
        """Brings the settings up to date with the groups. Checks the options where one was changed."""
        if self._settings.read(groups):
            self.forget_plans()

    def _current_plans(self, groups: list[Group], states: dict[Tensor, Any], gradients_to_come: bool) -> PlanSet:
        """Returns the plans, built anew if they cannot keep up with what was done to their tensors."""
        plans = self.plans
        try:
            fit = plans is not None and plans.keep_up(groups, states, gradients_to_come)
        except Exception:
            self.forget_plans()
            raise
        if plans is None or not fit:
            self.forget_plans()
            check_all_are_stepped(self._stepped, groups, states)
            self.plans = plans = PlanSet(groups, states, self.span, gradients_to_come)
        return plans

    def _current_estimates(self, groups: list[Group], plans: PlanSet, written: list[Published]) -> Estimates:
        """Returns the estimates with what was written to the groups since the last step."""
        estimates = self._estimates
        if estimates is None or estimates.rows.device != plans.device or len(estimates.rows) != plans.estimates:
            self._estimates = estimates = Estimates(plans.device, plans.estimates)
            written = all_changes(groups, None)
        if any(written):
            estimates.pull(written)
        return estimates

    def _watch(self, plans: PlanSet, hypers: list[Hyper]) -> None:
        # Once, and never in a capture: it waits for the device. Steps in which every lr is 0 do not count.
        if plans.slots and is_fake(plans.slots[0].param):
            return
        moving = any(isinstance(h.lr, Tensor) or h.lr for h in hypers)
        if moving and self._steps_watched < STUCK_AFTER_STEPS and not plans.capturing():
            self._steps_watched += 1
            if self._steps_watched == STUCK_AFTER_STEPS:
                warn_if_stuck(plans.slots)


class _Begun(NamedTuple):
    """A step that has begun."""

    plans: PlanSet
    step: Step
    hypers: list[Hyper]
    estimates: Estimates
    written: list[Published]  # to the groups since the last step
