"""Small networks for pictures, after VGG11, ResNet-50, a vision transformer and VarNet, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Returns a 3 x 3 convolution and its normalisation.

    By groups of channels, not over the batch: an average of iterates has no running statistics.
    """
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs))


def vgg(width: int = 16, classes: int = 10) -> nn.Sequential:
    """Returns VGG11's pattern, cut: convolutions and a pooling in turn, the width doubling, and one linear layer."""
    layers: list[nn.Module] = []
    channels = 1
    for outputs, pool in ((width, True), (2 * width, True), (4 * width, False), (4 * width, True)):
        layers += [conv(channels, outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, stride), conv(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output for a batch of feature maps."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet(width: int = 8, classes: int = 10) -> nn.Sequential:
    """Returns a residual network of one block per width, three widths."""
    blocks = [Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)]
    stem = [conv(1, width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def encoder(embd: int, layers: int, heads: int, norm_first: bool) -> nn.TransformerEncoder:
    """Returns a transformer's encoder without dropout, its normalisation before (ViT) or after (RoBERTa) each part."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(embd, heads, 4 * embd, **options)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(embd), enable_nested_tensor=False)


class ViT(nn.Module):
    """A vision transformer: patches of a picture as tokens, the mean of the outputs classified."""

    def __init__(self, side: int = 28, patch: int = 7, embd: int = 32, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, embd, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, embd))
        self.encoder = encoder(embd, layers, heads, norm_first=True)
        self.head = nn.Linear(embd, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns the logits of the classes."""
        tokens = self.patches(pictures).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(1))


# -- magnetic resonance -------------------------------------------------------------------------------------------


def to_image(frequencies: Tensor) -> Tensor:
    """Returns the complex picture of its frequencies."""
    return torch.fft.ifft2(frequencies, norm="ortho")


def to_frequencies(image: Tensor) -> Tensor:
    """Returns the frequencies of a complex picture."""
    return torch.fft.fft2(image, norm="ortho")


class VarNet(nn.Module):
    """An unrolled network after fastMRI's VarNet: each cascade pulls the frequencies to those measured, and refines.

    In place of the U-Net, a chain of three convolutions; in place of several coils and their sensitivities, one coil.
    """

    def __init__(self, cascades: int = 3, width: int = 16) -> None:
        super().__init__()
        self.pull = nn.Parameter(torch.ones(cascades))
        self.refine = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2, width, 3, padding=1), nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2),
                nn.Conv2d(width, 2, 3, padding=1),
            )
            for _ in range(cascades)
        )  # fmt: skip

    def forward(self, measured: Tensor, mask: Tensor) -> Tensor:
        """Returns the magnitude of the reconstructed pictures from masked frequencies."""
        k = measured
        for pull, refine in zip(self.pull, self.refine, strict=True):
            image = torch.view_as_real(to_image(k)).movedim(-1, 1)
            change = torch.view_as_complex(refine(image).movedim(1, -1).contiguous())
            k = k - pull * mask * (k - measured) - to_frequencies(change)
        return to_image(k).abs()


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Returns the mean structural similarity of two batches of pictures, each in the range of its `b`."""
    top = b.amax((1, 2), keepdim=True)[:, None]
    a, b = a[:, None], b[:, None]
    pool = lambda x: F.avg_pool2d(x, window, 1)  # noqa: E731
    mean_a, mean_b = pool(a), pool(b)
    unbiased = window**2 / (window**2 - 1)
    var_a, var_b = unbiased * (pool(a * a) - mean_a**2), unbiased * (pool(b * b) - mean_b**2)
    both = unbiased * (pool(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    parts = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return parts.mean()
