"""Small networks for words and tables, after an LSTM translator, RoBERTa and DLRM, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paper.networks.vision import encoder

PAD, START, END = 0, 1, 2  # the first tokens of every vocabulary of sequences


class Translator(nn.Module):
    """An LSTM reads a sequence in both directions, another writes the translation, with Luong's attention."""

    def __init__(self, sources: int, targets: int, embd: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.read = nn.Embedding(sources, embd, padding_idx=PAD)
        self.reader = nn.LSTM(embd, hidden // 2, batch_first=True, bidirectional=True)
        self.written = nn.Embedding(targets, embd, padding_idx=PAD)
        self.writer = nn.LSTM(embd, hidden, batch_first=True)
        self.look = nn.Linear(hidden, hidden, bias=False)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, targets)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Returns the logits of the token after each of `target`."""
        memory, state = self.reader(self.read(source))
        start = [part.transpose(0, 1).flatten(1)[None].contiguous() for part in state]
        written, _ = self.writer(self.written(target), tuple(start))
        scores = self.look(written) @ memory.transpose(1, 2)
        scores = scores.masked_fill((source == PAD)[:, None], -1e9)
        seen = scores.softmax(-1) @ memory
        return self.out(torch.tanh(self.mix(torch.cat([written, seen], -1))))

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        """Returns the mean cross-entropy per target token, in nats; `target` begins with START, and ends with END."""
        logits = self(source, target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)


class MaskedModel(nn.Module):
    """RoBERTa in small: tells the tokens that were hidden from it, from both sides; token 0 is the mask."""

    def __init__(self, vocabulary: int, block: int = 64, embd: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embd)
        self.positions = nn.Embedding(block, embd)
        self.encoder = encoder(embd, layers, heads, norm_first=False)
        self.transform = nn.Sequential(nn.Linear(embd, embd), nn.GELU(), nn.LayerNorm(embd))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def loss(self, shown: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean cross-entropy of the tokens at the positions of `hidden`, in nats."""
        x = self.encoder(self.tokens(shown) + self.positions.weight[: shown.shape[1]])
        logits = F.linear(self.transform(x[hidden]), self.tokens.weight, self.bias)
        return F.cross_entropy(logits, tokens[hidden])


def mask(tokens: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hides 15 % of the tokens as BERT does: 80 % of them behind the mask, 10 % random, 10 % shown.

    Args:
        tokens: numbers from 1 on.
        vocabulary: their number, with the mask, which is token 0.
        generator: decides.

    Returns:
        The tokens to show, the positions that count, and the tokens.
    """
    chance = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(1, vocabulary, tokens.shape, generator=generator)
    shown = torch.where(chance < 0.12, 0, torch.where(chance < 0.135, other, tokens))
    return shown, chance < 0.15, tokens


class DLRM(nn.Module):
    """Embeddings of categories and a perceptron of numbers, their products in pairs, and a perceptron on top."""

    def __init__(self, sizes: list[int], numbers: int, classes: int, embd: int = 8, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("starts", torch.tensor([0, *sizes[:-1]]).cumsum(0))
        self.categories = nn.Embedding(sum(sizes), embd)
        self.bottom = nn.Sequential(nn.Linear(numbers, width), nn.ReLU(), nn.Linear(width, embd), nn.ReLU())
        count = len(sizes) + 1
        self.register_buffer("pairs", torch.tril_indices(count, count, -1))
        inputs = embd + count * (count - 1) // 2
        self.top = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
        )
        # DLRM's own: uniform, within 1 / sqrt(rows of the table).
        for start, size in zip(self.starts.tolist(), sizes, strict=True):
            nn.init.uniform_(self.categories.weight.data[start : start + size], -(size**-0.5), size**-0.5)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        """Returns the logits of the classes."""
        dense = self.bottom(numbers)
        rows = torch.cat([dense[:, None], self.categories(categories + self.starts)], 1)
        products = (rows @ rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], 1))
