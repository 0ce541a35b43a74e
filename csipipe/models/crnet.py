"""CRNet: convolutions of two resolutions in the encoder, two CRBlocks in the decoder.

Source: Lu, Wang, Song, "Multi-resolution CSI feedback with deep learning in massive MIMO
system", ICC 2020. 2,102,838 parameters at c1 = 512, 1,054,006 at 256. Shapes: B rows, A angles,
D delays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csipipe.models.crblock import SLOPE, CRBlock, conv_bn
from csipipe.models.initial import xavier
from csipipe.models.layers import Linear
from csipipe.settings.config import KernelsBy, ModelSettings


def long_path(kernels_by: KernelsBy) -> nn.Sequential:
    """The encoder's path of three convolutions: (B, 2, A, D) → (B, 2, A, D)."""
    return nn.Sequential(
        conv_bn(2, 2, (3, 3), kernels_by),
        nn.LeakyReLU(SLOPE),
        conv_bn(2, 2, (1, 9), kernels_by),
        nn.LeakyReLU(SLOPE),
        conv_bn(2, 2, (9, 1), kernels_by),
    )


class Paths(nn.Module):
    """Two paths over the same image, their channels side by side: (B, 2, A, D) → (B, C, A, D)."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.other(x)], dim=1)


def encoder(model: ModelSettings) -> nn.Sequential:
    """(B, 2, A, D) → (B, c1)."""
    return xavier(
        nn.Sequential(
            Paths(long_path(model.kernels_by), conv_bn(2, 2, (3, 3), model.kernels_by)),
            nn.LeakyReLU(SLOPE),
            conv_bn(4, 2, (1, 1)),
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
            Linear(model.reals, model.c1),
        )
    )


def tail(model: ModelSettings) -> list[nn.Module]:
    """(B, c1) → (B, 2·A·D); `model.kernels` are the CRBlocks'."""
    layers = nn.Sequential(
        Linear(model.c1, model.reals),
        nn.Unflatten(1, model.image),
        conv_bn(2, 2, (5, 5), model.kernels_by),
        nn.LeakyReLU(SLOPE),
        CRBlock(model.kernels, model.kernels_by),
        CRBlock(model.kernels, model.kernels_by),
        nn.Flatten(),
    )
    return list(xavier(layers))


def head(model: ModelSettings) -> nn.Sequential:
    """The sigmoid, without parameters: (B, 2·A·D) → (B, 2, A, D) in [0, 1]."""
    return nn.Sequential(nn.Unflatten(1, model.image), nn.Sigmoid())
