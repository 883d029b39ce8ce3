"""Compares pure bfloat16 and float16, and state in 16 and in 8 bits, with float32, from the same starts: the validation
loss of the demo's GPT, and d there and on a regression where the reference never moves."""

import argparse
import copy
import json
import pathlib
import re

import rows
import torch
from regression import START, regression
from shared import GPT, RESULTS, Corpus, load_text
from torch.nn import functional as F

from prodigy_fused import Prodigy

RUNS = {
    "float32": (torch.float32, {}),
    "bfloat16 stochastic": (torch.bfloat16, {"low_precision": "stochastic"}),
    "bfloat16 24bit": (torch.bfloat16, {"low_precision": "24bit"}),
    "bfloat16 displacement": (torch.bfloat16, {"low_precision": "displacement"}),
    "bfloat16 stochastic, bfloat16 state": (
        torch.bfloat16,
        {"low_precision": "stochastic", "state_dtype": torch.bfloat16},
    ),
    "bfloat16 nearest": (torch.bfloat16, {"low_precision": "nearest"}),
    "float16 displacement": (torch.float16, {"low_precision": "displacement"}),
    "float32, moved start": (torch.float32, {}),
    "float32, 8-bit state": (torch.float32, {"state_dtype": "8bit"}),
    "float32, slice_p=11": (torch.float32, {"slice_p": 11}),
    "float32, 8-bit state, slice_p=11": (torch.float32, {"state_dtype": "8bit", "slice_p": 11}),
    "bfloat16 24bit, 8-bit state, slice_p=11": (
        torch.bfloat16,
        {"low_precision": "24bit", "state_dtype": "8bit", "slice_p": 11},
    ),
}
MOVED = 1e-4  # of each weight, at random: what happens to d by chance
VALIDATION = 256  # sequences


def loss(model, tokens, targets):
    """Returns the mean cross-entropy, in float32, of logits in the model's dtype."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def train(model, corpus, options, steps, batch, seed):
    """Trains a model as the demo does; returns the validation loss and d."""
    draw = torch.Generator().manual_seed(seed)
    val = corpus.get_batch("val", VALIDATION, model.block, draw)
    optimizer = Prodigy(model.param_groups(0.1), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, *corpus.get_batch("train", batch, model.block, draw)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return loss(model, *val).item(), optimizer.d


def regressions(runs, seeds):
    """Returns d after 500 steps relative to float32's: for each start and run, one of each seed."""
    found = {}
    for kind in START:
        exact = [regression(kind, seed=seed)[0] for seed in range(seeds)]
        for name, (dtype, options) in runs.items():
            ds = [regression(kind, dtype, seed=seed, **options)[0] for seed in range(seeds)]
            found[f"{kind}, {name}"] = [round(d / e, 3) for d, e in zip(ds, exact, strict=True)]
    return found


def main():
    """Trains everything, seed by seed, and writes the figures."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=12, help="sequences of 64 characters per step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", default="", help="regular expression of the names of those to compare with float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "low_precision.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = Corpus(load_text())
    runs = {name: run for name, run in RUNS.items() if name == "float32" or re.search(args.runs, name)}
    results = {name: {"loss": [], "d": []} for name in runs}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        start = GPT(len(corpus.vocabulary)).bfloat16().float()  # values that bfloat16 can represent
        for name, (dtype, options) in runs.items():
            model = copy.deepcopy(start).to(dtype)
            if "moved" in name:
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1 + MOVED * torch.randn_like(p))
            end, d = train(model, corpus, options, args.steps, args.batch, seed)
            results[name]["loss"].append(round(end, 4))
            results[name]["d"].append(float(f"{d:.4g}"))
            ratio = end / results["float32"]["loss"][seed]
            print(f"seed {seed}: {name:40} validation loss {end:.4f}, {ratio:.4f} of float32's, d {d:.3g}", flush=True)
    for figures in results.values():
        pairs = zip(figures["loss"], results["float32"]["loss"], strict=True)
        figures["of float32"] = round(sum(a / b for a, b in pairs) / args.seeds, 4)
    setting = {**rows.environment(torch.device("cpu"), "full"), "steps": args.steps, "batch": args.batch}
    setting["d of float32"] = regressions({name: run for name, run in runs.items() if "moved" not in name}, args.seeds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**setting, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
