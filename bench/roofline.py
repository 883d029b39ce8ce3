"""A cost model of a step: bytes over bandwidth, launches, one small all-reduce.

python bench/roofline.py             the table for 8 B, 70 B and 405 B parameters on 8 to 4,096 GPUs: a prediction
python bench/roofline.py FILE.csv    the error of the prediction against measured rows
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from typing import Any

import rows
from workloads import Shapes, llama3, numel, shard


def prodigy_bytes(
    x: int = 4,
    state: int = 4,
    slice_p: int = 1,
    displacement: bool = False,
    frozen: bool = False,
    moves: bool = False,
) -> float:
    """Returns the bytes per parameter of the update pass: reads g, x, m, v, s, x0, writes x, m, v, s.

    Args:
        x: bytes per element of the parameter, its gradient and x0.
        state: bytes per element of m, v and s.
        slice_p: s and x0 are read, and s is written, at every p-th element only.
        displacement: x - x0 in float32 is read and written, too. Needs all of x0.
        frozen: the estimate is fixed: there is no s, and x0 is not read.
        moves: d moves, so that x is corrected: reads x, m, v again, and writes x.
    """
    sampled = 0 if frozen else (2 * state + x) / slice_p
    passes = 2 if moves else 1
    return adamw_bytes(x, state) + sampled + (passes - 1) * 2 * (x + state) + passes * (2 * 4 if displacement else 0)


def adamw_bytes(x: int = 4, state: int = 4) -> float:
    """Returns the bytes per parameter of a fused AdamW: reads g, x, m, v, writes x, m, v."""
    return 3 * x + 4 * state


def prodigyopt_bytes(x: int = 4) -> float:
    """Returns the bytes per parameter of the reference: 31 accesses of `x` bytes, counted from its operations."""
    return 31 * x


@dataclass(frozen=True)
class Machine:
    """The numbers of a machine that a step's time depends on."""

    name: str
    gb_s: float  # bandwidth of a copy, read and written bytes both counted
    launch_us: float
    hop_us: float = 0.0  # latency of the all-reduce, per doubling of the ranks
    tflops: float = 0.0  # of a training step, achieved and not advertised


# All assumed: about 90 % of the advertised 4.8 TB/s, and common orders of magnitude. None of it measured here.
H200 = Machine("H200 (assumed)", gb_s=4300, launch_us=3, hop_us=6, tflops=400)


def step_seconds(elements: float, per_element: float, machine: Machine, launches: int = 2, ranks: int = 1) -> float:
    """Returns the seconds of a step on one rank that holds `elements`; the all-reduce of the two sums is not hidden."""
    hops = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    return elements * per_element / (1e9 * machine.gb_s) + 1e-6 * (launches * machine.launch_us + hops * machine.hop_us)


def training_seconds(parameters: float, tokens: float, machine: Machine) -> float:
    """Returns the seconds of forward and backward: six operations per parameter and token."""
    return 6 * parameters * tokens / (1e12 * machine.tflops)


@dataclass(frozen=True)
class Prediction:
    """The prediction for one rank of a fully sharded run."""

    gb: float  # of x, g and the state
    step: float  # seconds
    share: float  # of the optimizer in a training step


def predict(
    shapes: Shapes,
    machine: Machine,
    ranks: int,
    tokens: int,
    kept: float,
    moved: float,
    launches: int = 2,
    reduces: bool = True,
) -> Prediction:
    """Predicts a step on `shapes`, split over `ranks`.

    Args:
        tokens: per rank and step.
        kept: bytes per parameter in memory.
        moved: bytes per parameter that a step reads and writes, by one of the functions above.
        reduces: whether two sums are all-reduced.
    """
    elements = numel(shard(shapes, ranks))
    seconds = step_seconds(elements, moved, machine, launches, ranks if reduces else 1)
    rest = training_seconds(numel(shapes), tokens, machine)
    return Prediction(1e-9 * elements * kept, seconds, seconds / (seconds + rest))


MODELS = {"8 B": llama3(), "70 B": llama3(80, 8192, 1024, 28672), "405 B": llama3(126, 16384, 1024, 53248)}
RANKS, TOKENS, MEMORY_GB = (8, 64, 512, 4096), 8192, 141
# Bytes kept and moved per parameter, launches, and whether sums are all-reduced. In bfloat16, x, g and x0 have half the
# bytes, and x - x0 is kept in float32.
OPTIMIZERS = {
    "AdamW(fused)": (16, adamw_bytes(), 1, False),
    "slice_p=1": (24, prodigy_bytes(), 2),
    "slice_p=11": (16 + 8 / 11, prodigy_bytes(slice_p=11), 2),
    "bfloat16": (22, prodigy_bytes(x=2, displacement=True), 2),
    "frozen": (16, prodigy_bytes(frozen=True), 2, False),
    "prodigyopt": (24, prodigyopt_bytes(), 2),
}


def table(machine: Machine = H200) -> str:
    """Returns the predictions as a Markdown table."""
    head = " | ".join(f"{name} {what}" for what in ("ms", "share") for name in OPTIMIZERS)
    lines = [
        f"**Prediction, not measured.** Llama-3 shapes, fully sharded, {TOKENS:,} tokens a GPU and step. "
        f"{machine.name}: {machine.gb_s:.0f} GB/s, {machine.launch_us:g} us a launch, {machine.hop_us:g} us a hop of "
        f"the all-reduce, {machine.tflops:.0f} TFLOP/s reached. float32 but for the column bfloat16 (displacement in "
        "float32); "
        "prodigyopt without its waits for the device; GB are those of slice_p=1; share: of a training step.",
        "",
        f"| parameters | GPUs | GB a GPU | {head} |",
        "|---|" + "---:|" * (2 + 2 * len(OPTIMIZERS)),
    ]
    for model, shapes in MODELS.items():
        for ranks in RANKS:
            found = {name: predict(shapes, machine, ranks, TOKENS, *how) for name, how in OPTIMIZERS.items()}
            fits = {name: p.gb <= MEMORY_GB for name, p in found.items()}
            times = [f"{1e3 * p.step:.3f}" if fits[name] else "too large" for name, p in found.items()]
            shares = [f"{p.share:.2%}" if fits[name] else "" for name, p in found.items()]
            cells = [model, f"{ranks:,}", f"{found['slice_p=1'].gb:.1f}", *times, *shares]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def predicted_ms(row: dict[str, Any]) -> float | None:
    """Returns the model's time for a measured row at the bandwidth of its own run; None if its bytes are unknown."""
    if row["status"] != "ok" or not row["bytes"] or not rows.limit_gb_s(row):
        return None
    machine = Machine(row["device"], rows.limit_gb_s(row), H200.launch_us if row["cuda"] else 0)
    return 1e3 * step_seconds(row["parameters"], row["bytes"], machine, row["launches"] or 0)


def errors(measured: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """Returns row, prediction and relative error, for every row that the model applies to."""
    pairs = [(row, predicted_ms(row)) for row in measured if row["kind"] == "step"]
    return [(row, p, p / row["ms"] - 1) for row, p in pairs if p is not None]


def report(measured: list[dict[str, Any]]) -> str:
    """Returns the errors as Markdown, and their median size where memory is the limit."""
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


def main() -> None:
    """Prints the predictions, or the errors against a file of measurements."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("file", type=rows.file, nargs="?")
    args = parser.parse_args()
    print(report(rows.latest(rows.read(args.file))) if args.file else table())


if __name__ == "__main__":
    main()
