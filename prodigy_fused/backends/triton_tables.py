"""The tables of a Triton plan: rows of tensors, and the chunks that they are cut into."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..record import STEP
from ..step import Slot
from .tensor_list import memory_order


def rows_of(slots: Sequence[Slot], chunk: int) -> tuple[array[int], array[int]]:
    """Returns the rows of all tensors; and of every chunk, the tensor it belongs to."""
    from ..triton_kernels import tables

    rows, owners = array("Q"), array("Q")  # unsigned, as in tensor_list.py
    for i, slot in enumerate(slots):
        p, state, order = slot.param, slot.state, memory_order(slot.param)
        x0 = state.get("p0")
        stands_for_zero = x0 is not None and x0.dim() == 0 and (slot.slice_p > 1 or p.dim() > 0)
        row = tables.Tensor(
            x=p.data_ptr(),
            m=_address(state.get("exp_avg")),
            v=_address(state["exp_avg_sq"]),
            s=_address(state.get("s")),  # none: no samples
            x0=0 if stands_for_zero else _address(x0),
            delta=_address(state["delta"]) if slot.low_precision == "displacement" or slot.moves_in_codes else 0,
            low=_address(state["low"]) if slot.low_precision == "24bit" else 0,
            scale=_address(state["scale"]) if slot.coded else 0,
            numel=p.numel(),
            base=slot.base,
            slice_p=slot.slice_p,
            group=slot.group,
            first_chunk=len(owners),
            index=slot.random_index,
            stochastic=slot.low_precision == "stochastic",
            dims=len(order),
        )
        rows.extend(tables.tensor_row(row, order))
        owners.extend([i] * chunks_of(slot, chunk))
    return rows, owners


def chunks_of(slot: Slot, chunk: int) -> int:
    """Returns how many chunks a tensor has."""
    return -(-slot.param.numel() // chunk)


def ranges_of(slots: Sequence[Slot], estimates: int, chunk: int) -> array[int]:
    """Returns the first chunk of each estimate's tensors, and the number of all chunks."""
    counts = [0] * estimates
    for slot in slots:
        counts[slot.estimate] += chunks_of(slot, chunk)
    return array("Q", accumulate(counts, initial=0))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def cut(step_table: Tensor, record_bytes: int) -> tuple[Tensor, ...]:
    """Returns the parts of the step table, whose address and size are constant for the life of the plan."""
    record, groups, grads = step_table.tensor_split((STEP.size, record_bytes))
    return record.view(torch.float64), groups.view(torch.float64), grads.view(torch.int64)


def signed(address: int) -> int:
    """Returns an address as an int64: on Intel GPUs the highest bit is set."""
    return address - (1 << 64) if address >> 63 else address
