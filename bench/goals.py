"""Performance targets of the GPU backends and the measured values, as docs/benchmarks.md shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import rows
from peers import ANCHOR
from rows import Row

Rows = list[Row]
BILLION, GPT2, MANY = "1 B, GPT", "GPT-2 124 M", "1,000 x 1,000"
OURS, SAMPLED = "prodigy_fused(cuda)", "prodigy_fused(cuda, slice_p=11)"
TRITON = "prodigy_fused(triton)"
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
    Goal("share of the copy bandwidth", ">= 92 %", BILLION, lambda row, _: rows.share(row, row["copy_gb_s"]), "{:.1%}"),
    Goal("time to AdamW(fused)", "<= 1.43 x", BILLION, _to_anchor),
    Goal("time to AdamW(fused), slice_p=11", "<= 1.08 x", BILLION, _to_anchor, peer=SAMPLED),
    Goal("faster than prodigyopt", ">= 10 x", GPT2, faster_than("prodigyopt"), "{:.1f} x"),
    Goal("faster than prodigyopt", ">= 100 x", MANY, faster_than("prodigyopt"), "{:.1f} x"),
    Goal("faster than torch.compile of foreach", "> 1 x", GPT2, faster_than("compiled foreach")),
    Goal("faster than AdamW(foreach)", "> 1 x", GPT2, faster_than("AdamW(foreach)")),
    Goal("host time", "< 0.2 ms", MANY, _of("host_ms"), "{:.3f} ms"),
    Goal("host time to AdamW(fused)", "<= 0.1 x", MANY, _host_to_anchor),
    Goal("launches", "2", MANY, _of("launches"), "{:.0f}"),
    Goal("host synchronisations", "0", MANY, _of("syncs"), "{:.0f}"),
    Goal("extra memory", "< 1 MB", BILLION, _of("extra_bytes", 1e-6), "{:.3f} MB"),
    Goal("Triton: speed to the CUDA backend's", ">= 0.95 x", BILLION, faster_than(OURS), peer=TRITON),
    Goal("Triton: host time", "< 0.5 ms", MANY, _of("host_ms"), "{:.3f} ms", peer=TRITON),
]


def table(measured: Rows) -> list[list[str]]:
    """Returns the cells of a line per goal: what, parameters, target, and the value on the GPU measured last."""
    steps = [row for row in measured if row["cuda"] and row["dtype"] == "float32" and row["status"] == "ok"]
    last = max(steps, key=itemgetter("run"))["device"] if steps else ""
    steps = [row for row in steps if row["device"] == last]
    lines = []
    for goal in GOALS:
        same = [row for row in steps if row["workload"] == goal.workload and row["kind"] == "step"]
        values = (goal.figure(row, same) for row in same if row["peer"] == goal.peer)
        value = next((value for value in values if value is not None), None)
        shown = "not measured yet" if value is None else goal.form.format(value)
        lines.append([goal.what, goal.workload, goal.wanted, shown])
    return lines
