"""The numbers of an optimizer that are worth looking at."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .dtensor import index_map, is_dtensor, local, wrap
from .low_precision import check_mode, check_not_cast, float32_weights
from .options import Group
from .state import adapted, is_there, unwrapped
from .tensors import is_passenger

if TYPE_CHECKING:
    from .runtime import Runtime


class Readings:
    """Of :class:`prodigy_fused.Prodigy`, what can be read and not set. All of it waits for the device."""

    param_groups: list[Group]
    state: defaultdict[Tensor, Any]
    _runtime: Runtime

    def report(self) -> dict[str, float]:
        """Returns the numbers worth logging as plain floats. Waits for the device.

        Returns:
            ``d``; ``d_lr`` (d times lr: what Adam would call the learning rate); ``d_hat`` (the last estimate, before
            d's rules); ``k`` (steps); ``corrections`` and ``nonfinite_steps``. With several groups, ``d_lr/i`` of
            each; with ``split_groups``, every name with ``/i``.
        """
        self._runtime.look_for_nonfinite(self.param_groups)
        split = self._is_split()
        names = ("d", "d_hat", "k", "corrections", "nonfinite_steps")
        report: dict[str, float] = {}
        for i, group in enumerate(self.param_groups):
            suffix = f"/{i}" if len(self.param_groups) > 1 else ""
            if split or i == 0:
                report |= {name + (suffix if split else ""): float(group[name]) for name in names}
            report[f"d_lr{suffix}"] = float(group["d"]) * float(group["lr"])
        return report

    def float32_weights(self) -> dict[Tensor, Tensor]:
        """Returns the weights as exactly as they are kept, for export: of a 16-bit parameter with
        ``low_precision="24bit"`` or ``"displacement"`` what it is a rounded copy of.

        Returns:
            For each parameter (but lazy ones without a shape, and frozen codes) a new tensor of its shape, float32
            (float64 of float64; a DTensor of a DTensor).

        Raises:
            ValueError: a state that does not fit its parameter, which was cast or replaced; names it.

        Example:
            >>> exact = opt.float32_weights()
            >>> torch.save({name: exact.get(p, p) for name, p in model.named_parameters()}, "model.pt")
        """
        weights: dict[Tensor, Tensor] = {}
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, (p, group) in enumerate(every):
            if is_lazy(p) or is_passenger(p):
                continue
            check_mode(p, group)
            where, own = index_map(p), self.state.get(p, {})
            check_not_cast(index, p, own)
            own = unwrapped(p, own, group, where) if is_dtensor(p) else own
            own = adapted(index, local(p), own, group, where) if is_there(own) else own
            mine = float32_weights(local(p), own, group)
            weights[p] = wrap(mine, p, None) if is_dtensor(p) else mine
        return weights

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """False, as the reference says (to fairseq)."""
        return False

    @property
    def supports_flat_params(self) -> bool:
        """True, as the reference says (to fairseq)."""
        return True

    @property
    def d(self) -> float:
        """The estimate of the distance to the solution; ``d * lr`` is the step size. Waits for the device.

        Raises:
            RuntimeError: with ``split_groups`` there are several (so it is for the properties below).
        """
        return float(self._only("d"))

    @property
    def d0(self) -> float:
        """The first estimate."""
        return float(self._only("d0"))

    @property
    def step_count(self) -> int:
        """The number of steps so far, without those before the first non-zero gradient."""
        return int(self._only("k"))

    @property
    def nonfinite_steps(self) -> int:
        """The number of steps whose sums were not finite, which left the estimate unchanged."""
        steps = int(self._only("nonfinite_steps"))
        self._runtime.look_for_nonfinite(self.param_groups)
        return steps

    @property
    def corrections(self) -> int:
        """The number of steps in which d moved, which need a second pass over the parameters."""
        return int(self._only("corrections"))

    def _is_split(self) -> bool:
        return len(self.param_groups) > 1 and bool(self.param_groups[0]["split_groups"])

    def _only(self, name: str) -> Any:
        if self._is_split():
            raise RuntimeError(f"each group has an estimate of its own: read param_groups[i][{name!r}], or report()")
        return self.param_groups[0][name]
