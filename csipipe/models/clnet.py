"""CLNet: CRNet with attention in the encoder and smaller kernels in the decoder.

Source: Ji, Li, "CLNet: Complex Input Lightweight Neural Network Designed for Massive MIMO CSI
Feedback", IEEE Wireless Communications Letters 10(10), 2021. 2,101,958 parameters at c1 = 512,
1,053,126 at 256. Shapes: B rows, A angles, D delays, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csipipe.models.crblock import SLOPE, CRBlock, conv_bn
from csipipe.models.crnet import Paths, long_path
from csipipe.models.initial import xavier
from csipipe.models.layers import Conv2d, Linear
from csipipe.models.norm import BatchNorm2d
from csipipe.settings.config import Kernel, KernelsBy, ModelSettings

CHANNELS = 32
"""Complex filters of the 1×1 convolution beside the long path."""
KERNELS: tuple[tuple[Kernel, ...], ...] = (((3, 3), (1, 3), (3, 1)), ((1, 5), (5, 1)))
"""Of the decoder's CRBlocks."""


class SpatialAttention(nn.Module):
    """Pixels weighed by the largest and the mean channel around them: (B, C, A, D) → the same."""

    def __init__(self, kernels_by: KernelsBy) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            Conv2d(2, 1, (3, 3), bias=False, kernels_by=kernels_by),
            BatchNorm2d(1, momentum=0.01),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        out: Tensor = x * self.weigh(seen)
        return out


class ChannelAttention(nn.Module):
    """Channels weighed by the means of all (squeeze and excitation): (B, C, A, D) → the same."""

    def __init__(self, channels: int, between: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            Linear(channels, between, bias=False),
            nn.ReLU(),
            Linear(between, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.weigh(x.mean((2, 3)))[:, :, None, None]
        return out


def encoder(model: ModelSettings) -> nn.Sequential:
    """(B, 2, A, D) → (B, c1)."""
    beside = nn.Sequential(conv_bn(2, CHANNELS, (1, 1)), ChannelAttention(CHANNELS, CHANNELS // 16))
    by = model.kernels_by
    return nn.Sequential(
        *xavier(
            nn.Sequential(
                Paths(nn.Sequential(*long_path(by), SpatialAttention(by)), beside),
                nn.LeakyReLU(SLOPE),
                conv_bn(CHANNELS + 2, 2, (1, 1)),
                nn.LeakyReLU(SLOPE),
                nn.Flatten(),
            )
        ),
        Linear(model.reals, model.c1),
    )


def tail(model: ModelSettings) -> list[nn.Module]:
    """(B, c1) → (B, 2·A·D)."""
    reals = model.reals
    first = Linear(model.c1, reals)
    nn.init.uniform_(first.weight, -(reals**-0.5), reals**-0.5)  # PyTorch's for a deconvolution
    blocks = nn.Sequential(
        conv_bn(2, 2, (5, 5), model.kernels_by),
        nn.LeakyReLU(SLOPE),
        CRBlock(KERNELS, model.kernels_by),
        CRBlock(KERNELS, model.kernels_by),
    )
    return [first, nn.Unflatten(1, model.image), *xavier(blocks), nn.Flatten()]


def head(model: ModelSettings) -> nn.Sequential:
    """The hard sigmoid, without parameters: (B, 2·A·D) → (B, 2, A, D) in [0, 1]."""
    return nn.Sequential(nn.Unflatten(1, model.image), nn.Hardsigmoid())
