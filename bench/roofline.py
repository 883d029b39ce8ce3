"""The cost of a step predicted: bytes over bandwidth, launches, one small all-reduce.

python bench/roofline.py             the table for 8 B, 70 B and 405 B parameters on 8 to 4,096 GPUs: a prediction
python bench/roofline.py FILE.csv    the error of the prediction against measured rows
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows


def prodigy_bytes(x: int = 4, state: int = 4, slice_p: int = 1, displacement: bool = False) -> float:
    """Bytes per parameter of the update pass (DESIGN.md): reads g, x, m, v, s, x0, writes x, m, v, s.

    Args:
        x: bytes of an element of the parameter, its gradient and x0.
        state: of m, v and s.
        slice_p: s and x0 are read, and s is written, at every p-th element only.
        displacement: x - x0 is kept in float32: read and written, with all of x0, while x is only written.
    """
    moments = 4 * state
    if displacement:
        return x + moments + 2 * state / slice_p + 2 * 4 + x + x
    return x + 2 * x + moments + (2 * state + x) / slice_p


def adamw_bytes(x: int = 4, state: int = 4) -> float:
    """Bytes per parameter of a fused AdamW: reads g, x, m, v, writes x, m, v."""
    return 3 * x + 4 * state


def prodigyopt_bytes(x: int = 4, state: int = 4) -> float:
    """Of the reference, whose state has the parameter's dtype: 31 accesses, counted from its operations."""
    return 31 * x


@dataclass(frozen=True)
class Machine:
    """What a step's time depends on. Bandwidth of a copy, read and written bytes both counted."""

    name: str
    gb_s: float
    launch_us: float
    hop_us: float = 0.0  # of the all-reduce's latency, per doubling of the ranks
    tflops: float = 0.0  # of a training step, as reached and not as advertised


# Bandwidth: DESIGN.md and issue 3 expect it; the rest is a common order of magnitude. None of it measured here.
H200 = Machine("H200 (assumed)", gb_s=4300, launch_us=3, hop_us=6, tflops=400)


def step_seconds(elements: float, per_element: float, machine: Machine, launches: int = 2, ranks: int = 1) -> float:
    """Seconds of a step on one rank that holds `elements`; the all-reduce of the two sums is not hidden."""
    hops = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    return elements * per_element / (1e9 * machine.gb_s) + 1e-6 * (launches * machine.launch_us + hops * machine.hop_us)


def training_seconds(parameters: float, tokens: float, machine: Machine) -> float:
    """Seconds of forward and backward: six operations per parameter and token."""
    return 6 * parameters * tokens / (1e12 * machine.tflops)


def prediction(parameters: float, ranks: int, machine: Machine = H200, tokens: int = 8192) -> dict[str, float]:
    """One line of the table: fully sharded float32 parameters, `tokens` per rank and step."""
    elements = parameters / ranks
    step = {
        name: step_seconds(elements, per_element, machine, ranks=ranks)
        for name, per_element in (
            ("slice_p=1", prodigy_bytes()),
            ("slice_p=11", prodigy_bytes(slice_p=11)),
            ("prodigyopt", prodigyopt_bytes()),
        )
    }
    adamw = step_seconds(elements, adamw_bytes(), machine, launches=1)
    rest = training_seconds(parameters, tokens, machine)
    shares = {f"share of {name}": s / (s + rest) for name, s in step.items()}
    # x, g, m, v, s, x0: what must fit before anything else does.
    return {"GB": 24e-9 * elements, "AdamW": adamw, **step, **shares}


def table() -> str:
    """The predictions as Markdown."""
    lines = [
        f"**Prediction, not measured.** {H200.name}: {H200.gb_s:.0f} GB/s, {H200.launch_us:g} us a launch, "
        f"{H200.hop_us:g} us a hop, {H200.tflops:.0f} TFLOP/s reached; float32, fully sharded, 8,192 tokens a GPU; the "
        "reference without its host synchronisations.",
        "",
        "| parameters | GPUs | GB a GPU | AdamW(fused) ms | slice_p=1 ms | slice_p=11 ms | prodigyopt ms | "
        "share of a training step: slice_p=1 | slice_p=11 | prodigyopt |",
        "|---|" + "---:|" * 9,
    ]
    for billions in (8, 70, 405):
        for ranks in (8, 64, 512, 4096):
            p = prediction(1e9 * billions, ranks)
            if p["GB"] > 141:
                lines.append(f"| {billions} B | {ranks:,} | {p['GB']:.0f} | does not fit |" + " |" * 6)
                continue
            times = [f"{1e3 * p[name]:.3f}" for name in ("AdamW", "slice_p=1", "slice_p=11", "prodigyopt")]
            shares = [f"{p[f'share of {name}']:.2%}" for name in ("slice_p=1", "slice_p=11", "prodigyopt")]
            lines.append(f"| {billions} B | {ranks:,} | {p['GB']:.1f} | {' | '.join([*times, *shares])} |")
    return "\n".join(lines)


def predicted_ms(row: dict[str, Any]) -> float | None:
    """What the model says for a measured row, given the bandwidth of its own run; None without a count of its bytes."""
    if row["status"] != "ok" or not row["bytes"] or not row["copy_gb_s"]:
        return None
    machine = Machine(row["device"], rows.limit_gb_s(row), H200.launch_us if row["cuda"] else 0)
    return 1e3 * step_seconds(row["parameters"], row["bytes"], machine, row["launches"] or 0)


def errors(measured: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """Row, prediction and relative error, for every row the model has something to say about."""
    pairs = [(row, predicted_ms(row)) for row in measured if row["kind"] == "step"]
    return [(row, p, p / row["ms"] - 1) for row, p in pairs if p is not None]


def report(measured: list[dict[str, Any]]) -> str:
    """The errors as Markdown, and their median size where memory is the limit."""
    found = errors(measured)
    lines = ["| device | workload | peer | measured ms | predicted ms | error |", "|---|---|---|---:|---:|---:|"]
    for row, p, error in found:
        lines.append(
            f"| {row['device']} | {row['workload']} | {row['peer']} | {row['ms']:.3f} | {p:.3f} | {error:+.0%} |"
        )
    large = [abs(error) for row, _, error in found if row["parameters"] >= rows.BEYOND_CACHE]
    if large:
        lines += ["", f"Median error from {rows.BEYOND_CACHE:,} parameters on: {statistics.median(large):.0%}."]
    return "\n".join([*lines, "", "Below that the time goes into tables and checks per tensor, which the model omits."])


if __name__ == "__main__":
    print(report(rows.latest(rows.read(Path(sys.argv[1])))) if len(sys.argv) > 1 else table())
