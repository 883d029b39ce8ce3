"""FSDP2: the demo's GPT trained on two processes, saved, and continued on one; each has the same d.

    python examples/fsdp2.py

starts two runs of itself, which may be started by hand, too; the second finds the first one's checkpoint:

    torchrun --nproc-per-node 2 examples/fsdp2.py --folder checkpoint
    torchrun --nproc-per-node 1 examples/fsdp2.py --folder checkpoint

On a CPU with gloo; on GPUs the same program runs with nccl.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from prodigy_fused import Prodigy

HERE = pathlib.Path(__file__).resolve()
sys.path.append(str(HERE.parent / "shakespeare"))
from corpus import Corpus  # noqa: E402
from gpt import GPT  # noqa: E402

STEPS, BATCH, BLOCK = 60, 8, 32


def build(corpus, device):
    """Returns a sharded model and its optimizer: nothing but fully_shard is different from a run on one device."""
    torch.manual_seed(0)
    model = GPT(len(corpus.vocabulary), BLOCK, layers=2, heads=2, embd=32).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, Prodigy(model.param_groups(weight_decay=0.1), lr=1.0)


def train(model, opt, corpus, steps, device):
    """Takes steps, each rank with its part of the batch; returns the last loss, averaged over the ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in steps:
        batch = corpus.get_batch("train", BATCH, BLOCK, torch.Generator().manual_seed(step))
        tokens, targets = (part.chunk(ranks)[rank].to(device) for part in batch)
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        opt.step()
    total = loss.detach() / ranks
    dist.all_reduce(total)
    return total.item()


def work(folder):
    """Trains on the ranks that torchrun has started, from the checkpoint if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    corpus = Corpus(HERE.read_text() * 2)
    model, opt = build(corpus, device)
    steps = range(STEPS)
    if (folder / ".metadata").exists():
        names = ("model", "optimizer")
        saved = dict(zip(names, get_state_dict(model, opt), strict=True))
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        steps = range(STEPS, 2 * STEPS)
    loss = train(model, opt, corpus, steps, device)
    if steps.start == 0:
        states = get_state_dict(model, opt)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        print(f"  steps {steps.start} to {steps.stop} on {dist.get_world_size()} ranks: loss {loss:.3f}, d {opt.d:.4e}")
    dist.destroy_process_group()
    return loss


def start_ranks(ranks, folder):
    """Starts this program as torchrun does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(HERE)]
    subprocess.run([*command, "--folder", str(folder)], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, help="of the checkpoint")
    folder = parser.parse_args().folder
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as temporary:
            for ranks in (2, 1):
                start_ranks(ranks, folder or temporary)
        return
    if work(folder) > 3.6:
        raise SystemExit("did not learn")


if __name__ == "__main__":
    main()
