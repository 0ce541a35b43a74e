"""CsiNet: a convolution and a linear layer at the UE, two RefineNet blocks at the BTS.

Source: Wen, Shih, Jin, "Deep Learning for Massive MIMO CSI Feedback", IEEE Wireless
Communications Letters 7(5), 2018. BatchNorm normalises channels, as in the paper, with Keras's
constants; the authors' files for images with channels first normalise delays instead, because
Keras counts axes from the end. Shapes: B rows, A angles, D delays.
"""

from __future__ import annotations

from torch import Tensor, nn

from csipipe.models.initial import xavier
from csipipe.models.layers import Conv2d, Linear
from csipipe.models.norm import BatchNorm2d
from csipipe.settings.config import KernelsBy, ModelSettings

_SLOPE = 0.3


def _convolution(inputs: int, outputs: int, kernels_by: KernelsBy) -> Conv2d:
    return Conv2d(inputs, outputs, (3, 3), bias=True, kernels_by=kernels_by)


def _norm(channels: int) -> BatchNorm2d:
    return BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class RefineBlock(nn.Module):
    """Three convolutions with 8, 16 and 2 filters, added to the input: (B, 2, A, D) → the same."""

    def __init__(self, kernels_by: KernelsBy) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((2, 8), (8, 16), (16, 2)):
            if layers:
                layers.append(nn.LeakyReLU(_SLOPE))
            layers += [_convolution(before, after, kernels_by), _norm(after)]
        self.path = nn.Sequential(*layers)
        self.act = nn.LeakyReLU(_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x + self.path(x))
        return out


def encoder(model: ModelSettings) -> nn.Sequential:
    """(B, 2, A, D) → (B, c1)."""
    return xavier(
        nn.Sequential(
            _convolution(2, 2, model.kernels_by),
            _norm(2),
            nn.LeakyReLU(_SLOPE),
            nn.Flatten(),
            Linear(model.reals, model.c1),
        ),
        biases=True,
    )


def tail(model: ModelSettings) -> list[nn.Module]:
    """(B, c1) → (B, 2·A·D)."""
    layers = nn.Sequential(
        Linear(model.c1, model.reals),
        nn.Unflatten(1, model.image),
        RefineBlock(model.kernels_by),
        RefineBlock(model.kernels_by),
        nn.Flatten(),
    )
    return list(xavier(layers, biases=True))


def head(model: ModelSettings) -> nn.Sequential:
    """The output layer: (B, 2·A·D) → (B, 2, A, D) in [0, 1]."""
    return xavier(
        nn.Sequential(
            nn.Unflatten(1, model.image), _convolution(2, 2, model.kernels_by), nn.Sigmoid()
        ),
        biases=True,
    )
