"""The workloads: lists of parameter shapes, written out from the architectures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Shapes = list[tuple[int, ...]]
MILLION = 1 << 20


def numel(shapes: Shapes) -> int:
    """Returns the number of elements of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)


def linear(inputs: int, outputs: int, bias: bool = True) -> Shapes:
    """Returns the shapes of a linear layer."""
    return [(outputs, inputs), (outputs,)] if bias else [(outputs, inputs)]


def norm(width: int) -> Shapes:
    """Returns the shapes of a normalisation: gains and biases."""
    return [(width,), (width,)]


def conv(inputs: int, outputs: int, kernel: int) -> Shapes:
    """Returns the shapes of a two-dimensional convolution with bias."""
    return [(outputs, inputs, kernel, kernel), (outputs,)]


def transformer_block(width: int) -> Shapes:
    """Returns the shapes of attention with one fused projection, and of a perceptron four times as wide; with norms."""
    attention = [*norm(width), *linear(width, 3 * width), *linear(width, width)]
    return [*attention, *norm(width), *linear(width, 4 * width), *linear(4 * width, width)]


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """Returns the shapes of a GPT-2, whose output layer shares the token embedding."""
    return [(vocabulary, width), (context, width), *(transformer_block(width) * layers), *norm(width)]


def vit(layers: int = 12, width: int = 768, patch: int = 16, image: int = 224, classes: int = 1000) -> Shapes:
    """Returns the shapes of a vision transformer: a class token, positions, patches by a convolution."""
    positions = (image // patch) ** 2 + 1
    stem = [(1, 1, width), (1, positions, width), *conv(3, width, patch)]
    return [*stem, *(transformer_block(width) * layers), *norm(width), *linear(width, classes)]


def llama3(layers: int = 32, width: int = 4096, kv: int = 1024, hidden: int = 14336, words: int = 128256) -> Shapes:
    """Returns the shapes of a Llama 3: grouped-query attention, gated perceptron, gains only, an output layer."""
    attention = [(width, width), (kv, width), (kv, width), (width, width)]
    block = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(words, width), *(block * layers), (width,), (words, width)]


def shard(shapes: Shapes, ranks: int) -> Shapes:
    """Returns the shapes on the first rank under FSDP2, which splits every tensor along its first dimension."""
    return [(math.ceil(shape[0] / ranks), *shape[1:]) for shape in shapes]


# -- SDXL's UNet: three levels of 320, 640 and 1280 channels, attention with 0, 2 and 10 layers ------------------------
CHANNELS, DEPTHS, TIME, TEXT = (320, 640, 1280), (0, 2, 10), 1280, 2048


def resnet(inputs: int, outputs: int) -> Shapes:
    """Returns the shapes of a ResNet layer with a projection of the time."""
    shortcut = conv(inputs, outputs, 1) if inputs != outputs else []
    first = [*norm(inputs), *conv(inputs, outputs, 3), *linear(TIME, outputs)]
    return [*first, *norm(outputs), *conv(outputs, outputs, 3), *shortcut]


def attention(width: int, context: int) -> Shapes:
    """Returns the shapes of attention to a context of the given width."""
    queries, keys, values = ((width, n) for n in (width, context, context))
    return [queries, keys, values, *linear(width, width)]


def spatial_transformer(width: int, depth: int) -> Shapes:
    """Returns the shapes of two projections around `depth` blocks: self- and cross-attention, gated perceptron."""
    perceptron = [*linear(width, 8 * width), *linear(4 * width, width)]
    block = [*norm(width) * 3, *attention(width, width), *attention(width, TEXT), *perceptron]
    return [*norm(width), *linear(width, width), *(block * depth), *linear(width, width)] if depth else []


def sdxl_unet() -> Shapes:
    """Returns the shapes of SDXL's UNet: per level two ResNet layers on the way down, three up, each with attention."""
    shapes = [*conv(4, CHANNELS[0], 3), *linear(CHANNELS[0], TIME), *linear(TIME, TIME)]
    shapes += [*linear(2816, TIME), *linear(TIME, TIME)]  # pooled text and image sizes
    width, skips = CHANNELS[0], [CHANNELS[0]]
    for level, (channels, depth) in enumerate(zip(CHANNELS, DEPTHS, strict=True)):
        for _ in range(2):
            shapes += [*resnet(width, channels), *spatial_transformer(channels, depth)]
            width = channels
            skips.append(width)
        if level < 2:
            shapes += conv(width, width, 3)
            skips.append(width)
    shapes += [*resnet(width, width), *spatial_transformer(width, DEPTHS[-1]), *resnet(width, width)]
    for level, (channels, depth) in reversed(list(enumerate(zip(CHANNELS, DEPTHS, strict=True)))):
        for _ in range(3):
            shapes += [*resnet(width + skips.pop(), channels), *spatial_transformer(channels, depth)]
            width = channels
        if level > 0:
            shapes += conv(width, width, 3)
    return [*shapes, *norm(width), *conv(width, 4, 3)]


def text_encoder_linears(layers: int, width: int) -> Shapes:
    """Returns the matrices of a CLIP text encoder that a LoRA adapts: q, k, v, out and the perceptron's two."""
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * layers


def lora(linears: Shapes, rank: int) -> Shapes:
    """Returns two small matrices for every linear layer."""
    return [pair for outputs, inputs in linears for pair in ((rank, inputs), (outputs, rank))]


def sdxl_lora(rank: int = 16) -> Shapes:
    """Returns the shapes of a LoRA, as in practice: of all linear layers of SDXL's attention and text encoders."""
    transformers = [s for w, d, n in ((640, 2, 5), (1280, 10, 6)) for s in spatial_transformer(w, d) * n if len(s) == 2]
    return lora([*transformers, *text_encoder_linears(12, 768), *text_encoder_linears(32, 1280)], rank)


@dataclass(frozen=True)
class Workload:
    """A list of parameter shapes, and how it is measured."""

    name: str
    make: Callable[[], Shapes]
    rounds: int = 8  # timed turns of every peer
    cpu: bool = True  # measured on a CPU, too
    scan: bool = False  # part of the scan over sizes: with fewer peers
    policies: bool = False  # for our ways to store and to sample: with more of ours, and fewer peers

    @property
    def elements(self) -> int:
        """The number of parameters."""
        return numel(self.make())


def _scan(millions: int) -> Workload:
    name = f"scan, {millions} Mi"
    return Workload(name, lambda: [(MILLION,)] * millions, 40 if millions < 16 else 8, millions <= 64, True)


WORKLOADS = [
    Workload("8 x 4 Mi", lambda: [(4 * MILLION,)] * 8, 12, policies=True),
    Workload("16 x 16 Mi", lambda: [(16 * MILLION,)] * 16, 10, cpu=False, policies=True),
    Workload("16 x 4 Mi", lambda: [(4 * MILLION,)] * 16, 10),
    Workload("200 x 100,000", lambda: [(100_000,)] * 200, 25),
    Workload("1,000 x 1,000", lambda: [(1000,)] * 1000, 80),
    Workload("one tensor of 32 Mi", lambda: [(32 * MILLION,)]),
    Workload("GPT-2 124 M", lambda: gpt2(12, 768), 6),
    Workload("ViT-B/16", vit),
    Workload("SDXL LoRA, rank 16", sdxl_lora, 15),
    Workload("1 B, GPT", lambda: gpt2(18, 2048), cpu=False),
    Workload("GPT-2 1.5 B", lambda: gpt2(48, 1600), cpu=False),
    Workload("Llama-3 8 B, one of 8 ranks", lambda: shard(llama3(), 8), cpu=False),
    Workload("SDXL UNet", sdxl_unet, cpu=False),
    Workload("Llama-3 8 B", llama3, cpu=False),
    *map(_scan, (1, 4, 16, 64, 256, 1024)),
]
QUICK = [Workload("8 x 64 Ki", lambda: [(MILLION // 16,)] * 8, 5), Workload("50 x 100", lambda: [(100,)] * 50, 5)]
