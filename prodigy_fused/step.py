"""The contract between the optimizer and a backend (docs/design.md, "The backend contract").

A step has two phases. ``update`` moves m, v, s (and, if it can, x) with the old d and computes two sums; the optimizer
adds up the sums of all plans, over the ranks too; ``finish`` derives d_new from the sums and gives x the reference's
value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .dtensor import IndexMap
from .eight_bits import CODES
from .estimate import advance
from .hyper import EstimateOptions, Hyper
from .options import Group, Scalar
from .record import pack
from .tensors import sampled


class BucketKey(NamedTuple):
    """What the tensors of one plan have in common.

    The order of the fields is a promise: plans are built, and their sums are added, in the order of their keys, and
    within a plan in the order of the parameters. So the same parameters give the same sums in whatever groups.
    """

    backend: str
    device: str
    dtype: str  # of the parameters
    state_format: str  # the dtype of exp_avg, exp_avg_sq and s, or "8bit"
    sampled: bool  # whether slice_p > 1
    displaced: bool  # whether 16-bit parameters are kept as x0 + delta
    extended: bool  # or with 8 bits more
    frozen: bool  # whether the estimate is fixed, and the state has no samples
    counted: bool  # whether this rank's elements enter the sums (sharding.py); if not, they are summed and dropped


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a plan."""

    index: int  # among all parameters of the optimizer, for messages
    param: Tensor  # of a DTensor, this rank's tensor
    state: dict[str, Any]
    group: int
    slice_p: int
    low_precision: str | None = None  # how x is rounded (low_precision.py); None: it is float32 or float64
    estimate: int = 0  # whose sums the parameter enters
    frozen: bool = False  # enters none: the estimate is fixed, and the state has no samples
    random_index: int = 0  # among the parameters of its estimate, for random bits
    where: IndexMap | None = None  # of a shard, where its elements are in the whole: for samples and random bits
    coded: bool = False  # the state is in 8 bits, and random bits go by the place in the shard, as blocks of codes do
    moves_in_codes: bool = False  # and codes of x - x0 are kept in the place of x0
    whole: Tensor | None = None  # the DTensor, if it is one

    @property
    def parameter(self) -> Tensor:
        """The optimizer's parameter, which has the gradient."""
        return self.param if self.whole is None else self.whole

    @property
    def base(self) -> int:
        """Of a shard of consecutive elements, the index of the first one in the whole tensor; else 0."""
        return 0 if self.where is None or self.where.affine is None else self.where.affine.base

    @property
    def random_base(self) -> int:
        """As ``base``, for random bits."""
        return 0 if self.coded else self.base

    @property
    def random_where(self) -> IndexMap | None:
        """As ``where``, for random bits."""
        return None if self.coded else self.where

    def has_codes_of(self, key: str) -> bool:
        """Returns whether a tensor of the state holds codes."""
        return self.coded and key in CODES and self.state[key].dtype == CODES[key].storage

    def sampled(self, t: Tensor) -> Tensor:
        """Returns the elements of ``t``, a tensor of the parameter's shape, that take part in the estimate."""
        return sampled(t, self.slice_p, self.where)


@dataclass
class Step:
    """The scalars of one step."""

    hypers: Sequence[Hyper]  # one per parameter group
    options: Sequence[EstimateOptions]  # of each group's estimate
    rows: Tensor  # float64[E, 8], the estimates before the step: one for all groups, or one per group
    new_rows: Tensor  # written by the last plan's finish; may be `rows` itself
    grad_scale: Scalar = 1.0  # gradients are divided by it
    found_inf: Scalar = 0.0  # not zero: the step changes nothing, the estimates included
    sums: Tensor = field(init=False)  # float64[E, 2], the total over all plans; set between the phases

    @property
    def owners(self) -> Sequence[int]:
        """The index of each group's estimate."""
        groups = len(self.hypers)
        return range(groups) if len(self.rows) > 1 else [0] * groups

    @cached_property
    def record(self) -> bytes:
        """The numbers as the kernels read them."""
        return pack(self.hypers, self.options, self.owners, self.grad_scale, self.found_inf)

    def take_record_of(self, former: Step) -> None:
        """Takes over the record of a former step, if that has the very same numbers, so that none is packed."""
        mine, its = ((s.hypers, s.options, s.grad_scale, s.found_inf) for s in (self, former))
        scalars = (self.grad_scale, self.found_inf, *(h.lr for h in self.hypers))
        in_tensors = any(isinstance(value, Tensor) for value in scalars)  # which may have moved
        if all(map(is_, mine, its)) and not in_tensors and "record" in vars(former):
            vars(self)["record"] = former.record

    def advanced(self) -> Tensor:
        """Returns the estimates after the step, float64[E, 8], from ``sums``; a new tensor."""
        done, parts = 0, []
        for options, own in groupby(self.options[: len(self.rows)]):
            end = done + len(list(own))
            parts.append(advance(self.rows[done:end], self.sums[done:end], options))
            done = end
        return torch.cat(parts)

    def to(self, device: torch.device) -> Step:
        """Returns a copy with its tensors on ``device``; tensors already there are shared.

        Blocks only for copies to the CPU.
        """
        scalars = [self.rows, self.grad_scale, self.found_inf, *(h.lr for h in self.hypers)]
        if all(value.device == device for value in scalars if isinstance(value, Tensor)):
            return self
        moved = replace(
            self,
            hypers=[h._replace(lr=_moved(h.lr, device)) for h in self.hypers],
            rows=_moved(self.rows, device),
            new_rows=_moved(self.new_rows, device),
            grad_scale=_moved(self.grad_scale, device),
            found_inf=_moved(self.found_inf, device),
        )
        if hasattr(self, "sums"):
            moved.sums = _moved(self.sums, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value


class Plan(Protocol):
    """The tensors of one bucket, on one device, prepared for one backend."""

    sums: Tensor
    """float64[E, 2] on the plan's device: ``sum lr*bc*<g, x0 - x>`` and ``sum |s|`` over the parameters of each
    estimate, after :meth:`update`."""

    def unchanged(self) -> bool:
        """Returns whether the tensors are as they were when the plan last looked: not moved, cast or replaced."""

    def unchanged_at(self, at: int) -> bool:
        """Returns whether the tensors of slot ``at`` are."""

    def mend(self) -> bool:
        """Takes note of the addresses that the tensors have now. Returns whether that is all that has changed; if it is
        not, the plan is of no more use."""

    def extend(self, slots: Sequence[Slot]) -> None:
        """Takes up more tensors of the bucket: ``slots`` are those of the plan and new ones, in the order of the
        parameters. Afterwards the plan is as if it had been built for all of them."""

    def load_gradients(self, grads: list[Tensor | None]) -> None:
        """Checks the gradients of a step, one or None per tensor, and keeps the list for :meth:`update` and
        :meth:`finish`; it may put copies into it. Changes nothing else.

        Raises:
            ValueError, RuntimeError: a bad gradient (see :func:`prodigy_fused.tensors.check_gradient`).
        """

    def update(self, step: Step) -> None:
        """Phase 1. Tensors without a gradient, or in a group with lr 0, are left alone and enter no sum."""

    def finish(self, step: Step, last: bool) -> None:
        """Phase 2; the ``last`` plan of a step also writes the new estimates to ``step.new_rows``."""

    def release_gradients(self) -> None:
        """Drops what :meth:`load_gradients` kept. Called after every step, also one that was skipped or raised."""

    # A step whose gradients come one by one (open_step.py): begin, update_one of each, load_gradients with a stand-in
    # for each gradient that is no more, add_up, finish. It leaves the bits that update leaves.

    def begin(self, step: Step) -> None:
        """Begins phase 1: no tensor has entered the sums."""

    def update_one(self, step: Step, at: int, grad: Tensor) -> None:
        """Phase 1 of slot ``at`` alone, once in a step.

        Raises:
            ValueError, RuntimeError: a bad gradient; nothing has been changed then.
        """

    def add_up(self, step: Step) -> None:
        """Ends phase 1: ``sums`` become those of all tensors that were updated."""

    def partials(self) -> Any:
        """Returns what has entered the sums so far, for :meth:`put_partials` of this plan after :meth:`extend`."""

    def put_partials(self, partials: Any) -> None:
        """Puts back what has entered the sums."""


class Backend(Protocol):
    """One way to compute a step; a module with these names is one, too."""

    @property
    def COMPILED(self) -> bool:
        """Whether ``fused=True`` may choose it."""

    @property
    def ONE_PASS(self) -> bool:
        """Whether it steps all elements at once, so that no two parameters may share memory."""

    @property
    def READS_DEVICE(self) -> bool:
        """Whether its plans read scalars that are on the device, so that the host need not wait for them."""

    def missing(self, device: torch.device) -> str | None:
        """Returns what would have to be installed to use the backend on ``device``; None if nothing."""

    def unsupported(self, p: Tensor, group: Group) -> str | None:
        """Returns why the backend cannot take the parameter, and the remedy; None if it can."""

    def make_plan(self, key: BucketKey, slots: Sequence[Slot], estimates: int) -> Plan:
        """Returns a plan for the tensors of one bucket, whose optimizer has so many estimates. Allocates nothing of
        the parameters' size."""
