"""Everything that ranks exchange in a step, and which of them counts what.

Note [Sharding]
The estimate needs two sums over all elements of all parameters, each counted once, wherever it is and however often.

- The *span* of an optimizer are the ranks of all meshes of this rank's DTensors. What is on a smaller mesh, or plain,
  is the same on all of the span. Without DTensors the span are the ranks that share the estimate, if the flag
  ``fsdp_in_use`` or FSDP1 says that plain tensors are parts; else this rank alone, whose tensors are its own.
- An element is counted by one rank: of a DTensor, by the rank with coordinate 0 on every dimension of its mesh that
  replicates, where the mesh contains the span's first rank; of a plain tensor by the span's first rank, or by every
  rank where ``fsdp_in_use`` says that each has others. The sums of what is not counted are dropped, not divided: no
  rounding by 1/3, and no kernel knows of it.
- The sums are gathered from all ranks of ``process_group``, or of the span, and each rank adds them up for itself.
  An all-reduce may add them in another order in each group of replicas that is reduced apart; they would drift.
- All ranks take part in every step: also without gradients, with an ``lr`` of 0, or when the step is skipped.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dtensor import is_dtensor
from .options import Group, Scalar

LOST = "lost"  # stands for a process group that was given, and that neither a copy nor a file can hold


def holds_plain_parts(group: Group) -> bool:
    """Returns whether plain tensors of a group are other tensors, or other parts of them, on each rank."""
    return bool(group["fsdp_in_use"]) or any(map(_is_flattened, group["params"]))


class Span:
    """The ranks that share the estimates of one optimizer, see Note [Sharding].

    Args:
        process_group: a ProcessGroup or a DeviceMesh of all ranks that share them; None: it is derived.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.given = process_group
        self.group: Any = None  # None: this rank is alone
        self.ranks: list[int] = []
        self._given = self._checked(process_group)
        self._flattened: list[Tensor] = []
        self._handles: dict[int, Any] = {}

    def _checked(self, process_group: Any) -> Any:
        """Returns the process group that was given, None if none was."""
        if process_group is None or process_group is LOST:
            return None
        if _is_mesh(process_group):
            return _group_of(process_group)
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: this rank is not in it, so it has no part in the estimate")
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a ProcessGroup or a DeviceMesh, not {type(process_group).__name__}")
        return process_group

    def look(self, groups: list[Group], params: list[Tensor]) -> None:
        """Derives the ranks from the tensors that there are.

        Raises:
            RuntimeError: ``process_group`` has to be given.
            ValueError: it lacks ranks.
        """
        if self.given is LOST:
            raise RuntimeError(
                "this optimizer is a copy of one with process_group=..., which no copy can hold: assign it again, "
                "opt.process_group = ..."
            )
        if not (dist.is_available() and dist.is_initialized()):
            self.group, self.ranks = None, []
            return
        meshes: list[Any] = list(dict.fromkeys(p.device_mesh for p in params if is_dtensor(p)))  # type: ignore[attr-defined]
        self._find_handles([p for p in params if _is_flattened(p)])
        has_parts = bool(self._flattened) or any(group["fsdp_in_use"] for group in groups)
        ranks = sorted({rank for mesh in meshes for rank in _ranks_of(mesh)})
        if self._given is not None:
            _check_given(dist.get_process_group_ranks(self._given), ranks)
            self.group = self._given
        elif meshes:
            _check_whole(ranks)
            self.group = dist.group.WORLD
        else:
            self.group = dist.group.WORLD if has_parts else None
            if not has_parts:
                _check_not_divided(groups)
        if not ranks and self.group is not None:
            ranks = dist.get_process_group_ranks(self.group) if has_parts else [dist.get_rank()]
        self.ranks = ranks

    def counts(self, p: Tensor, group: Group) -> bool:
        """Returns whether this rank's elements of a parameter enter the sums."""
        if self.group is None:
            return True
        if is_dtensor(p):
            mesh: Any = p.device_mesh  # type: ignore[attr-defined]
            here = mesh.get_coordinate()
            first = here is not None and all(
                c == 0
                for c, placement in zip(here, p.placements, strict=True)  # type: ignore[attr-defined]
                if placement.is_replicate()
            )
            return first and self.ranks[0] in _ranks_of(mesh)
        if _is_flattened(p):
            return self._counts_flattened(p)
        return bool(group["fsdp_in_use"]) or dist.get_rank() == self.ranks[0]

    def is_part(self, p: Tensor, group: Group) -> bool:
        """Returns whether other ranks may have other elements of a parameter, so that the shapes of its state must not
        depend on the values that this rank has."""
        own = group["fsdp_in_use"] or _is_flattened(p) or (self.group is not None and len(self.ranks) == 1)
        return is_dtensor(p) or bool(own)

    def gather(self, sums: Tensor) -> Tensor:
        """Returns the sums over all ranks, the same bits on each. One collective, in stream order: the host does not
        wait.

        Args:
            sums: float64[E, 2], those of this rank.
        """
        if self.group is None or dist.get_world_size(self.group) == 1:
            return sums
        mine = sums.to(_device_for(self.group, sums.device)).contiguous()
        everyone = mine.new_empty(dist.get_world_size(self.group) * mine.numel())
        # torch 2.13 has renamed it, and warns of the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(everyone, mine.flatten(), group=self.group)
        return everyone.view(-1, *sums.shape).sum(0).to(sums.device)

    def agree(self, found_inf: Scalar, device: torch.device) -> Scalar:
        """Returns whether ``found_inf`` is not zero on any rank, as 0 or 1: all skip a step, or none. One collective.

        It must be set on all ranks or on none. It comes before the first phase, which writes.
        """
        if self.group is None:
            return found_inf
        worst = (torch.as_tensor(found_inf) != 0).to(_device_for(self.group, device), torch.float32)  # NaN, too
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.group)
        return worst.to(device)

    # -- FSDP1 ---------------------------------------------------------------------------------------------------------

    def _find_handles(self, flattened: list[Tensor]) -> None:
        """Finds the objects of FSDP1 that know whether their parameters are replicated, too.

        A parameter does not lead to them, but they are alive as long as their model is.
        """
        if list(map(id, flattened)) == list(map(id, self._flattened)):
            return
        self._flattened = flattened
        self._handles = {}
        if not flattened:
            return
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for handle in [found for found in gc.get_objects() if type(found) is FlatParamHandle]:
            flat = handle.flat_param
            self._handles |= dict.fromkeys(map(id, [flat, *(flat._params or ()), *(flat._shared_params or ())]), handle)

    def _counts_flattened(self, p: Tensor) -> bool:
        handle = self._handles.get(id(p))
        if handle is None:
            return True
        strategy = handle._sharding_strategy.name
        if strategy == "NO_SHARD":
            return dist.get_rank() == self.ranks[0]
        return "HYBRID" not in strategy or self.ranks[0] in dist.get_process_group_ranks(handle.process_group)


def _is_flattened(p: Any) -> bool:
    return hasattr(p, "_fsdp_flattened")


def _is_mesh(process_group: Any) -> bool:
    return hasattr(process_group, "mesh") and hasattr(process_group, "ndim")


def _ranks_of(mesh: Any) -> list[int]:
    return sorted(mesh.mesh.flatten().tolist())


def _group_of(mesh: Any) -> Any:
    """Returns the process group of all ranks of a mesh: one that is there, or else a new one."""
    ranks = _ranks_of(mesh)
    if ranks == dist.get_process_group_ranks(dist.group.WORLD):
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    # Ranks outside may be in another optimizer's step, and must not be waited for.
    return dist.new_group(ranks, use_local_synchronization=True)


def _check_given(given: list[int], ranks: list[int]) -> None:
    """Raises ``ValueError`` if ranks with the same parameters are not all in the group that was given."""
    if not {dist.get_rank(), *ranks} <= {*given}:
        raise ValueError(
            f"process_group has the ranks {given}, but this rank's parameters are on the ranks {ranks}: it must have "
            "all of them (of HSDP, those of the whole mesh)"
        )


def _check_whole(ranks: list[int]) -> None:
    """Raises ``RuntimeError`` if there are other ranks, on which there may be anything: replicas, which must not be
    counted twice, or the stages of a pipeline, which must be added up."""
    if len(ranks) < dist.get_world_size():
        raise RuntimeError(
            f"the parameters are on the ranks {ranks} of {dist.get_world_size()}: give Prodigy the ranks that share "
            "the estimate d, as process_group=... (a ProcessGroup or a DeviceMesh). If the other ranks have other "
            "parameters (stages of a pipeline), these are all of them; if they have replicas of the same ones, or do "
            "something else, those of the parameters' meshes"
        )


def _check_not_divided(groups: list[Group]) -> None:
    """Raises ``RuntimeError`` if ZeroRedundancyOptimizer has given each rank other parameters, which do not tell."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is None or dist.get_world_size() == 1:
        return
    for found in [found for found in gc.get_objects() if type(found) is zero.ZeroRedundancyOptimizer]:
        if found.optim.param_groups is groups:
            raise RuntimeError(
                "ZeroRedundancyOptimizer gives each rank other parameters: pass it fsdp_in_use=True, or each rank "
                "follows an estimate of its own"
            )


def _device_for(group: Any, device: torch.device) -> torch.device:
    """Returns where a tensor must be for a collective: on its device, if the group has a backend for it."""
    kinds = [known.type for known in group._device_types]
    if device.type in kinds or not kinds:
        return device
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
