"""One small GPT trained on Shakespeare by three optimizers at once: fused Prodigy, prodigyopt and AdamW.

Run it with `make demo`, or `python examples/shakespeare/demo.py` where the packages of the extra `demo` are installed.
"""

import argparse
import copy
import importlib
import json
import pathlib
import time

import torch
from corpus import Corpus, load_text
from display import Display, print_report
from gpt import GPT
from plot import plot
from runs import REFERENCE, TrainingRun, summary

NAMES = ("prodigy_fused", "prodigyopt", "adamw")
EVAL_SEQUENCES = 256


def parse_arguments(argv=None):
    """Parses the command line; every size defaults to nanoGPT's configuration for a CPU."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each optimizer")
    parser.add_argument("--optimizers", default=",".join(NAMES), help="which, in the order of their turns")
    parser.add_argument("--batch", type=int, default=12, help="sequences per step")
    parser.add_argument("--block", type=int, default=64, help="characters per sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--embd", type=int, default=128, help="width of the model")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="decoupled, of every optimizer")
    parser.add_argument("--adamw-lr", type=float, default=2e-3, help="peak rate of AdamW, the best of 1, 2 and 3e-3")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=pathlib.Path, default="build/demo", help="folder of demo.png")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--no-sample", action="store_true", help="generate no text at the end")
    args = parser.parse_args(argv)
    args.optimizers = args.optimizers.split(",")
    if unknown := set(args.optimizers) - set(NAMES):
        parser.error(f"unknown optimizer {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    sizes = (args.steps, args.batch, args.block, args.layers, args.heads, args.embd, args.threads)
    if min(sizes) < 1 or args.embd % args.heads:
        parser.error("sizes must be positive, and --embd a multiple of --heads")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def build_optimizer(name, groups, adamw_lr):
    """Returns the optimizer of that name; ends the program with a sentence if it is missing or cannot run here."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=adamw_lr, fused=True)
    fused = {} if name == REFERENCE else {"fused": True}
    try:
        # Everything else at its default: the demo is to show that nothing needs tuning.
        return importlib.import_module(name).Prodigy(groups, **fused)
    except ImportError as error:
        remedy = "install it, or leave it out with --optimizers"
        raise SystemExit(f"demo: {name} cannot be imported ({error}): {remedy}") from error
    except RuntimeError as error:
        raise SystemExit(f"demo: {name} cannot run on these parameters: {error}") from error


def build_runs(args, vocabulary):
    """Returns one run per optimizer, all with the same initial weights and the same cosine schedule."""
    torch.manual_seed(args.seed)
    model = GPT(vocabulary, args.block, args.layers, args.heads, args.embd).to(args.device)
    runs = []
    for name in args.optimizers:
        # A copy each, not one model trained three times: the runs take turns within a step.
        own = copy.deepcopy(model)
        optimizer = build_optimizer(name, own.param_groups(args.weight_decay), args.adamw_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        runs.append(TrainingRun(name, own, optimizer, schedule))
    return runs


def clock(device):
    """Returns the time in seconds, after all work queued on a GPU is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def train_step(run, inputs, targets, device):
    """Takes one step of one run; records its loss, its d, and the time of the optimizer and of the whole step."""
    run.optimizer.zero_grad()
    start = clock(device)
    loss = run.model.loss(inputs, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    ready = clock(device)
    # Nothing but step() itself: the scheduler and reading d are not part of an optimizer's cost.
    run.optimizer.step()
    end = clock(device)
    run.schedule.step()
    run.losses.append(loss.item())
    run.optimizer_ms.append((end - ready) * 1e3)
    run.step_ms.append((end - start) * 1e3)
    group = run.optimizer.param_groups[0]
    if "d" in group:
        run.d.append(float(group["d"]))


@torch.no_grad()
def held_loss(run, batch):
    """Returns the loss of a run on a batch, without training on it."""
    return run.model.loss(*batch).item()


def race(args, corpus, runs):
    """Trains all runs in turn, step by step: a busy moment of the machine then hits each of them alike."""
    draw = torch.Generator().manual_seed(args.seed)
    # One large batch of each, drawn once: a validation must not cost more than the steps between two of them.
    train, val = (corpus.get_batch(split, EVAL_SEQUENCES, args.block, draw) for split in ("train", "val"))
    every = max(10, args.steps // 20)
    with Display(runs, args.steps) as display:
        for step in range(1, args.steps + 1):
            batch = corpus.get_batch("train", args.batch, args.block, draw)
            for run in runs:
                train_step(run, *batch, args.device)
            if step % every == 0 or step == args.steps:
                for run in runs:
                    run.val.append((step, held_loss(run, val)))
                display.line(step)
            display.update(step)
    for run in runs:
        run.train_loss = held_loss(run, train)


def sample(run, corpus, characters=400):
    """Returns text that a run's model writes after a line break."""
    device = next(run.model.parameters()).device
    prompt = corpus.encode("\n").unsqueeze(0).to(device)
    return corpus.decode(run.model.generate(prompt, characters)[0].tolist()).strip()


def main(argv=None):
    """Runs the race and reports it."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    try:
        corpus = Corpus(load_text(), args.device)
    except FileNotFoundError as error:
        raise SystemExit(f"demo: {error}") from error
    runs = build_runs(args, len(corpus.vocabulary))
    start = time.perf_counter()
    race(args, corpus, runs)
    figures = summary(runs, args, time.perf_counter() - start)
    print_report(figures)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"\nplot: {plot(runs, figures, args.out / 'demo.png')}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"figures: {args.json}")
    if not args.no_sample:
        print(f"\nWritten by the model of {runs[0].name}:\n\n{sample(runs[0], corpus)}")


if __name__ == "__main__":
    main()
