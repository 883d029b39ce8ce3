"""Time of an optimizer step on a GPU: Prodigy fused and its peers, beside the copy bandwidth of the same run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from prodigy_fused import Prodigy

BYTES = {1: 40.0, 11: 28 + 12 / 11}  # per parameter in float32, by slice_p: DESIGN.md's count


def gpt(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> list[tuple[int, ...]]:
    """The shapes of a GPT's parameters."""
    block: list[tuple[int, ...]] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


WORKLOADS: dict[str, list[tuple[int, ...]]] = {
    "1 B, GPT": gpt(18, 2048),
    "GPT-2 124 M": gpt(12, 768),
    "1,000 x 1,000": [(1000,)] * 1000,
}


def peers() -> Iterator[tuple[str, Callable[[Any], torch.optim.Optimizer], int]]:
    """Name, constructor, and the most parameters that it is given."""
    huge = 1 << 40
    yield "prodigy_fused", lambda p: Prodigy(p, backend="cuda"), huge
    yield "prodigy_fused, slice_p=11", lambda p: Prodigy(p, backend="cuda", slice_p=11), huge
    yield "AdamW(fused)", lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True), huge
    yield "AdamW(foreach)", lambda p: torch.optim.AdamW(p, lr=1e-6, foreach=True), huge
    yield "foreach Prodigy", lambda p: Prodigy(p, backend="foreach"), huge
    if importlib.util.find_spec("prodigyopt"):
        import prodigyopt

        yield "prodigyopt", prodigyopt.Prodigy, 1 << 29


def milliseconds(work: Callable[[], Any], rounds: int, prepare: Callable[[], Any] = list) -> tuple[float, float]:
    """Of the device, from event to event, and of the host: medians. `prepare` comes before each round, unmeasured."""
    for _ in range(5):
        prepare()
        work()
    device, host = [], []
    for _ in range(rounds):
        prepare()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000)  # the device is busy until the host has queued its work
        begin = time.perf_counter()
        first.record()
        work()
        last.record()
        host.append(1e3 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
        device.append(first.elapsed_time(last))
    return statistics.median(device), statistics.median(host)


def copy_bandwidth(rounds: int) -> float:
    """Bytes read and written per second by a device-to-device copy of 2 GiB."""
    source = torch.empty(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source), rounds)[0])


def new_gradients(params: list[torch.nn.Parameter]) -> None:
    """Noise, in place. With the same gradient in every step d would grow in every step, and each one would be
    measured with the correction, which in training one in a hundred needs."""
    for p in params:
        p.grad = torch.randn_like(p) if p.grad is None else p.grad.normal_()


def measure(rounds: int) -> dict[str, Any]:
    bandwidth = copy_bandwidth(rounds)
    rows = []
    for workload, shapes in WORKLOADS.items():
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        for name, make, most in peers():
            if elements > most:
                continue
            params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
            opt = make(params)
            device, host = milliseconds(opt.step, rounds, lambda params=params: new_gradients(params))
            row = {"workload": workload, "optimizer": name, "elements": elements, "device_ms": device, "host_ms": host}
            if name.startswith("prodigy_fused"):
                row["corrections"] = opt.corrections
                ideal = elements * BYTES[11 if "11" in name else 1] / bandwidth
                row["share_of_copy_bandwidth"] = ideal / (1e-3 * device)
            rows.append(row)
            print(row, flush=True)
            del params, opt
            torch.cuda.empty_cache()
    return {"copy_bandwidth_gb_s": bandwidth / 1e9, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.json.write_text(json.dumps(measure(arguments.rounds), indent=1))
