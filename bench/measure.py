"""How an optimizer is measured: peers in turn, on the same fresh gradients, in a race; then memory, launches, waits."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import ANCHOR, COPY, IN_PLACE, Copier, Peer
from torch import Tensor, nn
from workloads import Shapes, numel

WARM_UP = 3  # creates state, fills tables, compiles
LEAST_ROUNDS = 5  # quartiles of fewer mean nothing
BUSY_CYCLES = 1_000_000  # for which the GPU is kept busy: about half a millisecond


@dataclass(frozen=True)
class Sample:
    """One step, in milliseconds: of the device, with the wait for it, and of the host until step() returns."""

    ms: float
    wall_ms: float | None = None
    host_ms: float | None = None


def _elapsed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def time_on_cpu(step: Callable[[], Any]) -> Sample:
    """By the clock on the wall."""
    return Sample(_elapsed(step))


def time_on_cuda(step: Callable[[], Any]) -> Sample:
    """Two steps: one on an idle device, waited for; one queued while the device is busy, as after a backward pass."""

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
    """What was raised, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@dataclass
class Racer:
    """A peer on tensors of its own, or a copy (without a peer); out of the race once its status is not "ok"."""

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
        """Whatever a peer raises is its result, and ends its race; the others go on."""
        try:
            yield
        except Exception as error:
            self.status = "missing" if isinstance(error, ModuleNotFoundError) else "failed"
            self.reason = first_line(error)
            self.params, self.optimizer = [], None

    def give(self, gradients: list[Tensor]) -> None:
        """Copies at fresh addresses, as a backward pass would leave them."""
        if self.peer is not None:
            for p, g in zip(self.params, gradients, strict=True):
                p.grad = g.clone()

    def drop(self) -> None:
        for p in self.params:
            p.grad = None


def state_bytes(optimizer: Any) -> int:
    """Bytes of all state tensors, each storage counted once."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    storages = (t.untyped_storage() for t in tensors(list(optimizer.state.values())))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak(changes: Iterable[int]) -> int:
    """The highest sum of a sequence of allocations (positive) and releases (negative)."""
    highest = current = 0
    for change in changes:
        current += change
        highest = max(highest, current)
    return highest


def extra_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most memory that torch's allocator gives out during a step, on top of what was in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    # Of the raw events: those of profile.events() lack what an operation allocated itself.
    return peak(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


def launch_names(events: Iterable[Any]) -> list[str]:
    """Of what a profiled step ran on the device; the ranges that torch puts around a step are no launches."""
    on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return [e.name for e in on_device if "Optimizer" not in e.name]


def count_launches(step: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return len(launch_names(profile.events()))


def count_syncs(step: Callable[[], Any]) -> int:
    """Host synchronisations, as torch's debug mode reports them."""
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
        shapes: of the parameters.
        peers: who takes part.
        limit: elements of the buffer that is copied in turn with them.
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
        """Every racer in turn with its own copy of the gradients."""
        for racer in (r for r in self.racers if r.status == "ok"):
            with racer.trying():
                racer.give(gradients)
                take(racer)
                racer.drop()

    def run(self, rounds: int, seconds: float, tick: Callable[[], Any] = lambda: None) -> list[Racer]:
        """`rounds` turns of everybody, fewer if `seconds` run out, then what is counted and not timed."""
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
            except Exception as error:  # such as a profiler without permission; the times are none the worse for it
                racer.reason = f"no {name}: {first_line(error)}"


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def needed(peers: list[Peer], tensor_bytes: int) -> int:
    """Bytes of a heat: everybody's tensors, the gradients and one copy of them, the largest temporaries."""
    kept, spare = sum(peer.tensors for peer in peers), max((peer.spare for peer in peers), default=0)
    return int((kept + spare + 2) * tensor_bytes)


def heats(peers: list[Peer], tensor_bytes: int, budget: int) -> tuple[list[list[Peer]], list[Peer]]:
    """Peers in as few groups as fit into memory, the anchor first in each; and those that fit into none."""
    anchors = [peer for peer in peers if peer.name == ANCHOR]
    groups, rejected = [anchors], []
    for peer in peers:
        if peer.name == ANCHOR:
            continue
        group = next((g for g in groups if needed([*g, peer], tensor_bytes) <= budget), None)
        if group is not None:
            group.append(peer)
        elif needed([*anchors[:1], peer], tensor_bytes) <= budget:
            groups.append([*anchors[:1], peer])
        else:
            rejected.append(peer)
    if needed(anchors[:1], tensor_bytes) > budget:
        return [], list(peers)
    return [group for group in groups if group], rejected
