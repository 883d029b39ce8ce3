"""What a step costs besides time: bytes of state, extra memory, launches, synchronisations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def state_bytes(optimizer: Any) -> int:
    """Returns the bytes of all state tensors, each storage counted once."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)
        elif hasattr(value, "__dict__"):  # FlashOptim's state: an object with codes and scales
            yield from tensors(vars(value))

    storages = (t.untyped_storage() for t in tensors(list(optimizer.state.values())))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak(changes: Iterable[int]) -> int:
    """Returns the highest running sum of a sequence of allocations (positive) and releases (negative), in bytes."""
    highest = current = 0
    for change in changes:
        current += change
        highest = max(highest, current)
    return highest


def extra_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Returns how many bytes torch's allocator gives out at most during a step, on top of those in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    # The raw events: those of profile.events() lack what an operation itself has allocated.
    return peak(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


def launches(events: Iterable[Any]) -> list[Any]:
    """Returns what a profiled step ran on the device, without torch's own ranges around a step."""
    on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return [e for e in on_device if "Optimizer" not in e.name]


def launch_counts(events: Iterable[Any]) -> dict[str, int | float]:
    """Returns the number of kernels, copies and fills of a profiled step, and the microseconds of the longest."""
    found = launches(events)
    return {"launches": len(found), "kernel_us": max((e.time_range.elapsed_us() for e in found), default=0.0)}


def count_launches(step: Callable[[], Any]) -> dict[str, int | float]:
    """Returns the columns about what a step runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return launch_counts(profile.events())


def count_syncs(step: Callable[[], Any]) -> int:
    """Returns the number of host synchronisations in a step, as torch's debug mode reports them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # "called a synchronizing CUDA operation"; the notice that the mode is a prototype has the word, too.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
