"""Performance targets and the measured values, as docs/benchmarks.md shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import peers
import rows
import torch
from peers import ANCHOR
from rows import Row

Rows = list[Row]
BILLION, GPT2, MANY = "1 B, GPT", "GPT-2 124 M", "1,000 x 1,000"
OURS, TRITON, FOREACH = (f"prodigy_fused({name})" for name in ("cuda", "triton", "foreach"))
Figure = Callable[[Row, Rows], float | None]


@dataclass(frozen=True)
class Goal:
    """A line of the table."""

    what: str
    wanted: str
    workload: str
    figure: Figure  # of a row, given all rows of its workload
    form: str = "{:.2f} x"
    peer: str = OURS


def faster_than(peer: str) -> Figure:
    """Returns a figure: how many times as long the peer's step takes as a row's.

    Both are taken relative to AdamW(fused), since the two may have run in different heats.
    """

    def figure(row: Row, same: Rows) -> float | None:
        own = rows.ratio(row, same, ANCHOR)
        others = (rows.ratio(other, same, ANCHOR) for other in same if other["peer"] == peer)
        return next((other / own for other in others if other and own), None)

    return figure


def _to_anchor(row: Row, same: Rows) -> float | None:
    return rows.ratio(row, same, ANCHOR)


def _host_to_anchor(row: Row, same: Rows) -> float | None:
    anchors = (other["host_ms"] for other in same if other["peer"] == ANCHOR and other["heat"] == row["heat"])
    return next((row["host_ms"] / host for host in anchors if host and row["host_ms"]), None)


def _of(name: str, scale: float = 1) -> Figure:
    return lambda row, _: None if row[name] is None else scale * row[name]


GOALS = [
    Goal("faster than prodigyopt", ">= 10 x", GPT2, faster_than("prodigyopt"), "{:.1f} x"),
    Goal("faster than prodigyopt", ">= 100 x", MANY, faster_than("prodigyopt"), "{:.1f} x"),
    Goal("faster than AdamW(foreach)", "> 1 x", GPT2, faster_than("AdamW(foreach)")),
    Goal("host time", "<= 0.4 ms", MANY, _of("host_ms"), "{:.3f} ms"),
    Goal("host time to AdamW(fused)", "<= 0.17 x", MANY, _host_to_anchor),
    Goal("the update kernel alone", "<= 14 us", MANY, _of("kernel_us"), "{:.1f} us"),
    Goal("launches", "2", MANY, _of("launches"), "{:.0f}"),
    Goal("host synchronisations", "0", MANY, _of("syncs"), "{:.0f}"),
    Goal("extra memory", "< 1 MB", BILLION, _of("extra_bytes", 1e-6), "{:.3f} MB"),
    Goal("Triton: host time", "< 0.5 ms", MANY, _of("host_ms"), "{:.3f} ms", peer=TRITON),
    Goal("foreach: faster than AdamW(foreach)", ">= 0.5 x", GPT2, faster_than("AdamW(foreach)"), peer=FOREACH),
    Goal("foreach: faster than AdamW(foreach)", ">= 0.5 x", MANY, faster_than("AdamW(foreach)"), peer=FOREACH),
]


@dataclass(frozen=True)
class Policy:
    """A way to store and to sample, as a line of a table; a goal that is None was not set."""

    dtype: str
    variant: str  # as in the peer's name; empty: the default options
    share: float | None = None  # of the bandwidth of a copy, at least
    gpu: float | None = None  # times the time of AdamW(fused), at most
    cpu: float | None = None  # the same on a CPU
    triton: float | None = None  # times as fast as the CUDA backend, at least

    def peer(self, backend: str) -> str:
        """Returns the name of the peer on a backend."""
        return f"prodigy_fused({backend}{', ' * bool(self.variant)}{self.variant})"

    def bytes(self) -> float:
        """Returns the bytes per parameter that a step moves."""
        dtype = getattr(torch, self.dtype)
        counts = {peer.name: peer.count for peer in peers.variants("", dtype, plain=False)}
        return counts.get(self.peer(""), peers.our_bytes)(dtype)


POLICIES = [
    Policy("float32", "", 0.96, 1.15, 1.37, 0.93),
    Policy("float32", "slice_p=11", 0.88, 0.92, 1.10, 0.93),
    Policy("float32", "bfloat16 state", cpu=1.6),
    Policy("float32", "bfloat16 state, slice_p=11", cpu=1.4),
    Policy("float32", "8-bit state", None, 0.70, 1.37),
    Policy("float32", "8-bit state, slice_p=11", None, 0.63, 1.37),
    Policy("float32", "d moves", cpu=1.9),
    Policy("float32", "zero gradients"),
    Policy("float32", "frozen"),
    # 24 bits are the default; most goals are of when "stochastic" was.
    Policy("bfloat16", ""),
    Policy("bfloat16", "slice_p=11"),
    Policy("bfloat16", "bfloat16 state"),
    Policy("bfloat16", "bfloat16 state, slice_p=11", gpu=0.85),
    Policy("bfloat16", "stochastic", 0.92, 1.40, 1.5, 0.93),
    Policy("bfloat16", "stochastic, slice_p=11", 0.85, 1.10, None, 0.93),
    Policy("bfloat16", "stochastic, bfloat16 state", 0.90, 0.90, 1.6, 0.93),
    Policy("bfloat16", "stochastic, bfloat16 state, slice_p=11", 0.80, 0.75, 1.4, 0.93),
    Policy("bfloat16", "displacement", 0.92, None, 1.5, 0.93),
    Policy("bfloat16", "8-bit state, slice_p=11", gpu=0.75),
    Policy("bfloat16", "frozen"),
    Policy("float16", "", 0.92, None, None, 0.93),
    Policy("float16", "slice_p=11", 0.85, 1.10, None, 0.93),
]
# By device the workload in which all of them race, and one in which some did before there was that.
POLICY_WORKLOADS = {"cpu": ("8 x 4 Mi",), "cuda": ("16 x 16 Mi", BILLION)}


def on_last_gpu(measured: Rows) -> Rows:
    """Returns the valid rows of optimizers on the GPU that was measured last."""
    steps = [row for row in measured if row["cuda"] and row["kind"] == "step" and row["status"] == "ok"]
    last = max(steps, key=itemgetter("run"))["device"] if steps else ""
    return [row for row in steps if row["device"] == last]


def table(measured: Rows) -> list[list[str]]:
    """Returns the cells of a line per goal: what, parameters, target, and the value on the GPU measured last."""
    steps = [row for row in on_last_gpu(measured) if row["dtype"] == "float32"]
    lines = []
    for goal in GOALS:
        same = [row for row in steps if row["workload"] == goal.workload]
        values = (goal.figure(row, same) for row in same if row["peer"] == goal.peer)
        value = next((value for value in values if value is not None), None)
        shown = "not measured yet" if value is None else goal.form.format(value)
        lines.append([goal.what, goal.workload, goal.wanted, shown])
    return lines


def _cell(value: float | None, form: str, sign: str, goal: float | None) -> str:
    """Returns a value with its goal in brackets, and - for a value that was not measured."""
    wanted = "" if goal is None else f" ({sign} {form.format(goal)})"
    return ("-" if value is None else form.format(value)) + wanted


def _figure(policy: Policy, backend: str, rows_of_dtype: Rows, figure: Figure) -> float | None:
    peer = policy.peer(backend)
    values = (figure(row, rows_of_dtype) for row in rows_of_dtype if row["peer"] == peer and row["status"] == "ok")
    return next((value for value in values if value is not None), None)


def policies(measured: Rows, device: str) -> tuple[str, list[list[str]]]:
    """Returns the name of the workload, and the cells of a line per policy, from the rows of one machine.

    Args:
        device: "cpu" or "cuda".
    """
    known, lines = {row["workload"] for row in measured}, []
    workload = next((name for name in POLICY_WORKLOADS[device] if name in known), POLICY_WORKLOADS[device][0])
    for policy in POLICIES:
        same = [row for row in measured if (row["workload"], row["dtype"]) == (workload, policy.dtype)]
        of = partial(_figure, policy, device, same)
        cells = [f"{policy.dtype}{', ' * bool(policy.variant)}{policy.variant}", f"{policy.bytes():.3g}"]
        if device == "cpu":
            lines.append([*cells, _cell(of(_to_anchor), "{:.2f} x", "<=", policy.cpu)])
            continue
        triton = _figure(policy, "triton", same, faster_than(policy.peer("cuda")))
        cells.append(_cell(of(lambda row, _: rows.share(row, row["copy_gb_s"])), "{:.0%}", ">=", policy.share))
        cells.append(_cell(of(_to_anchor), "{:.2f} x", "<=", policy.gpu))
        lines.append([*cells, _cell(triton, "{:.2f} x", ">=", policy.triton)])
    return workload, lines
