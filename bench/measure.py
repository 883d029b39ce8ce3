"""Measures optimizers: a race in turns on the same fresh gradients; then memory, launches and synchronisations."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import COPY, IN_PLACE, Copier, Peer
from torch import Tensor, nn
from workloads import Shapes, numel

WARM_UP = 3  # steps in which state is created, tables are filled and code is compiled
LEAST_ROUNDS = 5  # quartiles of fewer mean nothing
BUSY_CYCLES = 1_000_000  # clock cycles for which the GPU is kept busy: about half a millisecond


@dataclass(frozen=True)
class Sample:
    """The times of one step, in milliseconds."""

    ms: float  # on the device
    wall_ms: float | None = None  # on an idle GPU, until its work is done
    host_ms: float | None = None  # on a busy GPU, until step() returns


def _elapsed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def time_on_cpu(step: Callable[[], Any]) -> Sample:
    """Returns the wall-clock time of a step."""
    return Sample(_elapsed(step))


def time_on_cuda(step: Callable[[], Any]) -> Sample:
    """Times two steps: one on an idle device, and one queued while the device is busy, as after a backward pass."""

    def waited() -> None:
        step()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    wall = _elapsed(waited)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    first.record()
    host = _elapsed(step)
    last.record()
    torch.cuda.synchronize()
    return Sample(first.elapsed_time(last), wall, host)


def first_line(error: Exception) -> str:
    """Returns the exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@dataclass
class Racer:
    """A participant of a race: a peer on tensors of its own, or a copy (without a peer).

    It takes part as long as its status is "ok"; what it has counted lies in `counts`, by column of a row.
    """

    name: str
    peer: Peer | None = None
    params: list[nn.Parameter] = field(default_factory=list)
    optimizer: Any = None
    samples: list[Sample] = field(default_factory=list)
    status: str = "ok"  # or "not run", "missing" (not installed), "failed"
    reason: str = ""
    counts: dict[str, int | float | None] = field(default_factory=dict)

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Records an exception as the racer's result, which ends its race; the others go on."""
        try:
            yield
        except Exception as error:
            self.status = "missing" if isinstance(error, ModuleNotFoundError) else "failed"
            self.reason = first_line(error)
            self.params, self.optimizer = [], None

    def give(self, gradients: list[Tensor]) -> None:
        """Sets gradients, copies at fresh addresses, as a backward pass would leave them."""
        if self.peer is not None:
            for p, g in zip(self.params, gradients, strict=True):
                p.grad = g.clone()

    def drop(self) -> None:
        """Drops the gradients."""
        for p in self.params:
            p.grad = None


def state_bytes(optimizer: Any) -> int:
    """Returns the bytes of all state tensors, each storage counted once."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

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


def launch_names(events: Iterable[Any]) -> list[str]:
    """Returns the names of what a profiled step ran on the device, without torch's own ranges around a step."""
    on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return [e.name for e in on_device if "Optimizer" not in e.name]


def count_launches(step: Callable[[], Any]) -> int:
    """Returns the number of kernels, copies and fills that a step runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return len(launch_names(profile.events()))


def count_syncs(step: Callable[[], Any]) -> int:
    """Returns the number of host synchronisations in a step, as torch's debug mode reports them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


class Race:
    """One heat on one workload.

    Args:
        shapes: the parameters' shapes.
        peers: the optimizers that take part.
        device, dtype: of the parameters and gradients.
        limit: elements of the buffer that is copied in turn with the steps.
    """

    def __init__(
        self, shapes: Shapes, peers: list[Peer], device: torch.device, dtype: torch.dtype, limit: int = 1 << 26
    ) -> None:
        self.shapes, self.device, self.dtype = shapes, device, dtype
        self.elements = numel(shapes)
        self.time = time_on_cuda if device.type == "cuda" else time_on_cpu
        self.racers = [Racer(name, optimizer=Copier(name, limit, device)) for name in (COPY, IN_PLACE)]
        self.racers += [self._enter(peer) for peer in peers]

    def _enter(self, peer: Peer) -> Racer:
        torch.manual_seed(0)
        racer = Racer(peer.name, peer)
        with racer.trying():
            make = {"device": self.device, "dtype": self.dtype}
            racer.params = [nn.Parameter(torch.randn(shape, **make)) for shape in self.shapes]
            racer.optimizer = peer.make(racer.params)
        return racer

    def _gradients(self) -> list[Tensor]:
        return [torch.randn(shape, device=self.device, dtype=self.dtype) for shape in self.shapes]

    def _turns(self, gradients: list[Tensor], take: Callable[[Racer], None]) -> None:
        """Calls `take` for every racer in turn, with its own copy of the gradients."""
        for racer in (r for r in self.racers if r.status == "ok"):
            with racer.trying():
                racer.give(gradients)
                take(racer)
                racer.drop()

    def run(self, rounds: int, seconds: float, tick: Callable[[], Any] = lambda: None) -> list[Racer]:
        """Times `rounds` turns of every racer, fewer if `seconds` run out, then counts what is not timed.

        Args:
            tick: called after every turn.

        Returns:
            All racers, without their tensors.
        """
        with uncollected():
            for _ in range(WARM_UP):
                self._turns(self._gradients(), lambda racer: racer.optimizer.step())
                tick()
            start = time.perf_counter()
            for done in range(rounds):
                if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
                    break
                self._turns(self._gradients(), lambda racer: racer.samples.append(self.time(racer.optimizer.step)))
                tick()
        self._turns(self._gradients(), self._count)
        for racer in self.racers:
            racer.params, racer.optimizer = [], None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or the next heat would not see the memory as free
        return self.racers

    def _count(self, racer: Racer) -> None:
        if racer.peer is None:
            return
        step = racer.optimizer.step
        counters = {
            "state_bytes": lambda: round(state_bytes(racer.optimizer) / self.elements, 3),
            "extra_bytes": lambda: extra_bytes(step, self.device),
        }
        if self.device.type == "cuda":
            counters |= {"syncs": lambda: count_syncs(step), "launches": lambda: count_launches(step)}
        for name, count in counters.items():
            try:
                racer.counts[name] = count()
            except Exception as error:  # such as a profiler without permission; the times are valid all the same
                racer.reason = f"no {name}: {first_line(error)}"


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Switches garbage collection off for a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
