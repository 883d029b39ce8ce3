"""Measures optimizers: a race in turns on the same fresh gradients; then memory, launches and synchronisations."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from counts import count_launches, count_syncs, extra_bytes, state_bytes
from gradients import drawn
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


def time_on_cuda(step: Callable[[], Any], renew: Callable[[], Any]) -> Sample:
    """Times two steps: one on an idle device, and one queued while the device is busy, as after a backward pass.

    Args:
        renew: gives the second step gradients of its own. On those of the first, every second step would move d.
    """

    def waited() -> None:
        step()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    wall = _elapsed(waited)
    renew()
    torch.cuda.synchronize()
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
    given: int = 0  # gradients of so many steps
    turns: int = 0  # that were timed
    moves: int | None = None  # timed turns in which d moved, if the optimizer counts them

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Records an exception as the racer's result, which ends its race; the others go on."""
        try:
            yield
        except Exception as error:
            self.status = "missing" if isinstance(error, ModuleNotFoundError) else "failed"
            self.reason = first_line(error)
            self.params, self.optimizer = [], None

    def give(self, gradients: list[Tensor], k: int = 0) -> None:
        """Sets gradients made from those given, at fresh addresses, as a backward pass would leave them.

        Args:
            k: which of the gradients that each can make.
        """
        if self.peer is not None:
            for p, g in zip(self.params, gradients, strict=True):
                p.grad = self.peer.gradients(drawn(g, k), self.given == 0)
            self.given += 1

    def corrections(self) -> int | None:
        """Returns how often d has moved, which waits for the device; None of an optimizer that does not say."""
        return getattr(self.optimizer, "corrections", None)

    def record(self, sample: Callable[[], Sample]) -> None:
        """Takes a sample, and keeps it if d moved in all of its steps, or in none, as is the peer's to show."""
        before, given = self.corrections(), self.given - 1
        taken = sample()
        after = self.corrections()
        self.turns += 1
        if self.peer is None or before is None or after is None:
            self.samples.append(taken)
            return
        self.moves = (self.moves or 0) + (after > before)
        if after - before == (self.given - given if self.peer.moves else 0):
            self.samples.append(taken)

    def conclude(self) -> None:
        """Says which turns were left out because of d; without enough of the others the racer has failed."""
        if left_out := self.turns - len(self.samples):
            self.reason = f"{left_out} of {self.turns} turns left out: d moved in {self.moves}"
            self.status = "ok" if len(self.samples) >= min(self.turns, LEAST_ROUNDS) else "failed"

    def drop(self) -> None:
        """Drops the gradients."""
        for p in self.params:
            p.grad = None


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
                self._turns(gradients := self._gradients(), partial(self._time, gradients))
                tick()
        for racer in (r for r in self.racers if r.status == "ok"):
            racer.conclude()
        self._turns(gradients := self._gradients(), partial(self._count, gradients))
        for racer in self.racers:
            racer.params, racer.optimizer = [], None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or the next heat would not see the memory as free
        return self.racers

    def _time(self, gradients: list[Tensor], racer: Racer) -> None:
        step, renew = racer.optimizer.step, partial(racer.give, gradients, 1)
        racer.record(partial(time_on_cuda, step, renew) if self.device.type == "cuda" else partial(time_on_cpu, step))

    def _count(self, gradients: list[Tensor], racer: Racer) -> None:
        if racer.peer is None:
            return
        step = racer.optimizer.step
        counters: dict[str, Callable[[], Any]] = {
            "extra_bytes": lambda: extra_bytes(step, self.device),
            "state_bytes": lambda: round(state_bytes(racer.optimizer) / self.elements, 3),
        }
        if self.device.type == "cuda":
            counters |= {"syncs": lambda: count_syncs(step), "launches": lambda: count_launches(step)}
        for k, (name, count) in enumerate(counters.items()):
            try:
                racer.give(gradients, k)
                found = count()
                racer.counts |= found if isinstance(found, dict) else {name: found}
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
