"""A cost model of a step: bytes over bandwidth, launches, one small all-gather.

python bench/roofline.py             the table for 8 B, 70 B and 405 B parameters on 8 to 4,096 GPUs: a prediction, from
                                     the rows that an H200 has measured
python bench/roofline.py FILE.csv    the error of the prediction against measured rows
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
from workloads import Shapes, llama3, numel, shard


def prodigy_bytes(
    x: int = 4,
    state: int = 4,
    slice_p: int = 1,
    beside: int = 0,
    frozen: bool = False,
    moves: bool = False,
) -> float:
    """Returns the bytes per parameter of the update pass: reads g, x, m, v, s, x0, writes x, m, v, s.

    Args:
        x: bytes per element of the parameter, its gradient and x0.
        state: bytes per element of m, v and s.
        slice_p: s and x0 are read, and s is written, at every p-th element only.
        beside: bytes per element kept beside x, read and written, too: 4 of a displacement, 1 of 24 bits.
        frozen: the estimate is fixed: there is no s, and x0 is not read.
        moves: d moves, so that x is corrected: reads x, m, v again, and writes x.
    """
    sampled = 0 if frozen else (2 * state + x) / slice_p
    passes = 2 if moves else 1
    return adamw_bytes(x, state) + sampled + (passes - 1) * 2 * (x + state) + passes * 2 * beside


def adamw_bytes(x: int = 4, state: float = 4) -> float:
    """Returns the bytes per parameter of a fused AdamW: reads g, x, m, v, writes x, m, v."""
    return 3 * x + 4 * state


def coded_bytes(x: int = 4, slice_p: int = 1, beside: int = 0) -> float:
    """Returns the bytes per parameter of the update pass with state in 8 bits: each 256 codes have a scale of a byte.

    Args:
        x, beside: as of `prodigy_bytes`.
        slice_p: with 1, s and x - x0 are codes, read and written; else s is float32, and x0 as the parameter.
    """
    code = 1 + 1 / 256
    return adamw_bytes(x, code) + (4 * code if slice_p == 1 else (2 * 4 + x) / slice_p) + 2 * beside


def flash_bytes(x: int = 4) -> float:
    """Returns the bytes per parameter of FlashOptim's AdamW: m and v have 8 bits, and a scale of two bytes for each 32
    elements, and a 16-bit x has a byte beside it."""
    return 3 * x + 4 * (1 + 2 / 32) + (2 if x == 2 else 0)


def prodigyopt_bytes(x: int = 4) -> float:
    """Returns the bytes per parameter of the reference: 31 accesses of `x` bytes, counted from its operations."""
    return 31 * x


@dataclass(frozen=True)
class Gather:
    """The latency of an all-gather of a few bytes: a ring, through which they go step by step, in microseconds."""

    base_us: float
    near_us: float  # a step to a GPU of the same node
    far_us: float  # a step to the next node
    per_node: int  # GPUs

    def seconds(self, ranks: int) -> float:
        """Returns the time on this many GPUs."""
        if ranks == 1:
            return 0.0
        far = -(-ranks // self.per_node) - 1
        return 1e-6 * (self.base_us + far * self.far_us + (ranks - 1 - far) * self.near_us)


@dataclass(frozen=True)
class Machine:
    """The numbers of a machine that a step's time depends on."""

    name: str
    gb_s: float  # bandwidth of a copy, read and written bytes both counted
    launch_us: float
    gather: Gather | None = None
    tflops: float = 0.0  # of a training step, achieved and not advertised


# NCCL gathers in a ring, in which the latency grows linearly; these are the numbers by which NCCL itself estimates it
# (src/graph/tuning.cc: ring, protocol LL, NVLink and network). Not measured here: one GPU gathers nothing.
NCCL = Gather(base_us=6.6, near_us=0.6, far_us=2.7, per_node=8)
# The copy as measured (bench/results/NVIDIA-H200); launches and what training reaches are assumed.
H200 = Machine("NVIDIA H200", gb_s=4250, launch_us=3, gather=NCCL, tflops=400)


def step_seconds(elements: float, per_element: float, machine: Machine, launches: int = 2) -> float:
    """Returns the seconds of a step on one rank that holds `elements`, of which each moves so many bytes."""
    return elements * per_element / (1e9 * machine.gb_s) + 1e-6 * launches * machine.launch_us


def training_seconds(parameters: float, tokens: float, machine: Machine) -> float:
    """Returns the seconds of forward and backward: six operations per parameter and token."""
    return 6 * parameters * tokens / (1e12 * machine.tflops)


@dataclass(frozen=True)
class Optimizer:
    """What the table has a column of."""

    name: str
    kept: float  # bytes per parameter in memory: x, g and the state
    peer: str  # whose rows say how long a step takes
    dtype: str = "float32"
    gathers: bool = True  # the two sums


# bfloat16 has a float32 displacement. Frozen, or prodigyopt's own way of reducing, there is no row of.
OPTIMIZERS = (
    Optimizer("AdamW(fused)", 16, "AdamW(fused)", gathers=False),
    Optimizer("slice_p=1", 24, "prodigy_fused(cuda)"),
    Optimizer("slice_p=11", 16 + 8 / 11, "prodigy_fused(cuda, slice_p=11)"),
    Optimizer("bfloat16", 22, "prodigy_fused(cuda, displacement)", "bfloat16"),
    Optimizer("prodigyopt", 24, "prodigyopt"),
)
MEASURED = Path(__file__).parent / "results" / "NVIDIA-H200" / "2026-11-26-6fd1e19" / "bench.csv"
LARGE = "1 B, GPT"  # the workload that is nearest to a shard of a large model


def seconds_per_element(measured: list[dict[str, Any]], optimizer: Optimizer) -> float:
    """Returns how long an optimizer took for each parameter of the large workload.

    Raises:
        ValueError: no row says it.
    """
    for row in measured:
        if (row["kind"], row["workload"], row["peer"], row["dtype"], row["status"]) == (
            ("step", LARGE, optimizer.peer, optimizer.dtype, "ok")
        ):
            return 1e-3 * float(row["ms"]) / int(row["parameters"])
    raise ValueError(f"no row of {optimizer.peer} for {LARGE}, {optimizer.dtype}")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one rank of a fully sharded run."""

    gb: float  # of x, g and the state
    update: float  # seconds of a step without the all-gather
    gather: float  # seconds
    share: float  # of both in a training step


def predict(
    shapes: Shapes, machine: Machine, ranks: int, tokens: int, optimizer: Optimizer, per_element: float
) -> Prediction:
    """Predicts a step on `shapes`, split over `ranks`. The all-gather is not hidden by anything.

    Args:
        tokens: per rank and step.
        per_element: seconds, as measured on one GPU.
    """
    elements = numel(shard(shapes, ranks))
    update = elements * per_element
    gather = machine.gather.seconds(ranks) if optimizer.gathers and machine.gather else 0.0
    rest = training_seconds(numel(shapes), tokens, machine)
    return Prediction(1e-9 * elements * optimizer.kept, update, gather, (update + gather) / (update + gather + rest))


MODELS = {"8 B": llama3(), "70 B": llama3(80, 8192, 1024, 28672), "405 B": llama3(126, 16384, 1024, 53248)}
RANKS, TOKENS, MEMORY_GB = (8, 64, 512, 4096), 8192, 141


def table(machine: Machine = H200, measured: list[dict[str, Any]] | None = None) -> str:
    """Returns the predictions as a Markdown table."""
    measured = rows.read(MEASURED) if measured is None else measured
    costs = [(optimizer, seconds_per_element(measured, optimizer)) for optimizer in OPTIMIZERS]
    names = [optimizer.name for optimizer in OPTIMIZERS]
    head = ["parameters", "GPUs", "GB a GPU", *names, "all-gather", "share", "of AdamW"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for model, shapes in MODELS.items():
        for ranks in RANKS:
            found = [predict(shapes, machine, ranks, TOKENS, *cost) for cost in costs]
            adamw, ours = found[0], found[1]
            times = [f"{1e3 * p.update:.3g} ms" if p.gb <= MEMORY_GB else "too large" for p in found]
            shares = [f"{p.share:.2%}" if p.gb <= MEMORY_GB else "" for p in (ours, adamw)]
            cells = [model, f"{ranks:,}", f"{ours.gb:.1f}", *times, f"{1e3 * ours.gather:.3g} ms", *shares]
            lines.append(f"| {' | '.join(cells)} |")
    commit = measured[0]["commit"]
    return "\n".join([*lines, "", NOTE.format(commit=commit, device=machine.name, tflops=machine.tflops)])


NOTE = f"""**Predicted, not measured.** Llama 3's shapes, fully sharded, {TOKENS:,} tokens a GPU and step. The time of a
step is what the {{device}} took per parameter of "{LARGE}" (commit {{commit}}); that of the all-gather is NCCL's own
estimate of a ring through nodes of {NCCL.per_node} GPUs. Share: of both, with `slice_p=1`, in a training step at
{{tflops:.0f}} TFLOP/s a GPU, which is assumed; GB: x, g and state, with `slice_p=1`. float32, but for bfloat16 with a
displacement. prodigyopt is without its wait for every tensor, and each rank would follow another `d`."""


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
