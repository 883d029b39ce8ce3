"""The bytes that a training step needs besides the activations: parameters, state, and gradients at the peak.

python bench/memory.py    minutes, 4 GB; writes bench/results/memory.json, of which `make figures` makes chart and table

The model is the demo's GPT in the sizes of GPT-2, its output layer tied to the token embedding, on a few tokens: the
activations are small then, and do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import rows
import torch
from counts import extra_bytes, state_bytes
from peers import ANCHOR
from shared import GPT, RESULTS
from torch import nn

import prodigy_fused
from prodigy_fused import Prodigy

FILE = RESULTS / "memory.json"
GPT2 = {"vocabulary": 50257, "block": 1024, "layers": 12, "heads": 12, "embd": 768}
TOKENS = 8
Options = dict[str, dict[str, Any]]
# All are combined with each other, where that is possible: a new way to store is a line here.
ROUNDINGS: dict[torch.dtype, Options] = {
    torch.float32: {"": {}},
    torch.bfloat16: {
        "stochastic": {"low_precision": "stochastic"},
        "24bit": {"low_precision": "24bit"},
        "displacement": {"low_precision": "displacement"},
    },
}
STATES: Options = {
    "float32 state": {},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "8-bit state": {"state_dtype": "8bit"},
}
SAMPLES: Options = {"": {}, "slice_p=11": {"slice_p": 11}}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    dtype: torch.dtype  # of the parameters
    name: str  # what is special about the optimizer
    options: dict[str, Any] | None = None  # None: AdamW(fused)
    release: bool = False  # gradients are released

    def make(self, params: list[nn.Parameter]) -> Any:
        """Returns the optimizer."""
        if self.options is None:
            return torch.optim.AdamW(params, lr=1e-4, fused=True)
        return Prodigy(params, **self.options)


def possible(dtype: torch.dtype, options: dict[str, Any]) -> bool:
    """Returns whether the optimizer takes these options together."""
    try:
        Prodigy([nn.Parameter(torch.zeros(1, dtype=dtype))], **options)
    except ValueError:
        return False
    return True


def cases() -> list[Case]:
    """Returns AdamW(fused) and all combinations, with gradients that are kept and that are released."""
    found = []
    for dtype, roundings in ROUNDINGS.items():
        found.append(Case(dtype, ANCHOR))
        for parts in product(roundings.items(), STATES.items(), SAMPLES.items()):
            options = {key: value for _, own in parts for key, value in own.items()}
            name = ", ".join(name for name, _ in parts if name)
            if possible(dtype, options):
                found += [Case(dtype, name, options, release) for release in (False, True)]
    return found


def measure(case: Case, sizes: dict[str, int], tokens: int = TOKENS) -> dict[str, Any]:
    """Takes two training steps, and measures in the second one.

    Returns:
        A row: the case, and bytes per parameter, those of gradients being the peak of all that `backward` and `step`
        have allocated.
    """
    torch.manual_seed(0)
    model = GPT(**sizes).to(case.dtype)
    params = list(model.parameters())
    optimizer = case.make(params)
    handle = prodigy_fused.enable_gradient_release(optimizer) if case.release else None

    def forward() -> Callable[[], None]:
        loss = model.loss(*torch.randint(sizes["vocabulary"], (2, 1, tokens)))

        def backward_and_step() -> None:
            loss.backward()
            optimizer.step()

        return backward_and_step

    forward()()  # the first step creates the state
    optimizer.zero_grad()
    extra = extra_bytes(forward(), torch.device("cpu"))
    if handle is not None:
        handle.remove()
    elements = sum(p.numel() for p in params)
    found = {"parameters": sum(p.nbytes for p in params), "state": state_bytes(optimizer), "gradients": extra}
    what = {"dtype": str(case.dtype).removeprefix("torch."), "optimizer": case.name, "release": case.release}
    return {**what, **{name: round(value / elements, 3) for name, value in found.items()}}


Bar = dict[str, Any]


def bars(results: dict[str, Any]) -> list[Bar]:
    """Returns the rows of a file of results, with and without gradient release in one: "gradients" and "released"."""
    found: dict[tuple[str, str], Bar] = {}
    for row in results["rows"]:
        bar = found.setdefault((row["dtype"], row["optimizer"]), {"released": None, **row})
        bar["released" if row["release"] else "gradients"] = row["gradients"]
    return list(found.values())


def table() -> str:
    """Returns the committed rows as Markdown."""
    results = json.loads(FILE.read_text())
    lines = ["| bytes per parameter | parameters | state | gradients | released | all | of AdamW |"]
    lines.append("| --- |" + " ---: |" * 6)
    found = bars(results)
    for bar in found:
        anchor = next(other for other in found if (other["dtype"], other["optimizer"]) == (bar["dtype"], ANCHOR))
        least = bar["gradients"] if bar["released"] is None else bar["released"]
        total, of = (b["parameters"] + b["state"] + g for b, g in ((bar, least), (anchor, anchor["gradients"])))
        released = "-" if bar["released"] is None else f"{least:.2f}"
        cells = [f"{bar['parameters']:.0f}", f"{bar['state']:.2f}", f"{bar['gradients']:.2f}", released]
        lines.append(
            f"| {bar['dtype']}: {' | '.join([bar['optimizer'], *cells, f'{total:.1f}', f'{total / of:.2f} x'])} |"
        )
    where = f"{results['device']}, torch {results['torch']}, commit {results['commit']}, {results['date']}"
    return "\n".join([*lines, "", f"Measured; {results['elements']:,} parameters, {where}."])


def main() -> None:
    """Measures all cases, one after the other, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting: dict[str, Any] = rows.environment(torch.device("cpu"), "full")
    setting["elements"] = sum(p.numel() for p in GPT(**GPT2).parameters())
    found = []
    for case in cases():
        found.append(measure(case, GPT2))
        print(found[-1], flush=True)
        gc.collect()
    args.out.write_text(json.dumps({**setting, "tokens": TOKENS, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
