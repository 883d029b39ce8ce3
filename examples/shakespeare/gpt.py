"""A character-level GPT after nanoGPT, in plain PyTorch: the model that the demo trains."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal self-attention, then a perceptron four times as wide, each reading a normalised input."""

    def __init__(self, embd, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(embd, bias=False)
        self.qkv = nn.Linear(embd, 3 * embd, bias=False)
        self.attention_out = nn.Linear(embd, embd, bias=False)
        self.mlp_norm = nn.LayerNorm(embd, bias=False)
        self.mlp_in = nn.Linear(embd, 4 * embd, bias=False)
        self.mlp_out = nn.Linear(4 * embd, embd, bias=False)

    def forward(self, x):
        batch, length, embd = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, embd // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(batch, length, embd))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Token and position embeddings, `layers` blocks, and an output layer that shares the token embedding."""

    def __init__(self, vocabulary, block=64, layers=4, heads=4, embd=128):
        super().__init__()
        self.block = block
        self.tokens = nn.Embedding(vocabulary, embd)
        self.positions = nn.Embedding(block, embd)
        self.blocks = nn.ModuleList(Block(embd, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(embd, bias=False)
        self._init_weights(layers)

    def _init_weights(self, layers):
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            # 2 * layers matrices add to the residual stream, whose variance must not grow with depth.
            scale = 1 / math.sqrt(2 * layers) if name.endswith("out.weight") else 1.0
            nn.init.normal_(weight, std=0.02 * scale)

    def forward(self, tokens):
        """Returns the logits of the next character at every position."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, tokens, targets):
        """Returns the mean cross-entropy per character, in nats."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def param_groups(self, weight_decay):
        """Returns parameter groups for an optimizer: matrices are decayed, the gains of the norms are not."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        gains = [p for p in self.parameters() if p.dim() < 2]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]

    @torch.no_grad()
    def generate(self, tokens, count, temperature=0.8):
        """Returns `tokens` (one row per text) continued by `count` sampled characters."""
        for _ in range(count):
            logits = self(tokens[:, -self.block :])[:, -1]
            choice = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            tokens = torch.cat([tokens, choice], dim=1)
        return tokens
