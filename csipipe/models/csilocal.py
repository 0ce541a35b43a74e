"""The paper's autoencoder: encoder, decoder tail and decoder head, as counted in its Fig. 4.

Shapes: B rows, A angles, D delays; images are (B, 2, A, D), real and imaginary part, in [0, 1].
"""

from __future__ import annotations

import torch
from torch import nn

from csipipe.models.crblock import SLOPE, CRBlock
from csipipe.models.layers import Conv2d, Linear
from csipipe.models.norm import BatchNorm2d
from csipipe.settings.config import ModelSettings


def encoder(model: ModelSettings) -> nn.Sequential:
    """CsiNet's encoder F1: (B, 2, A, D) → (B, c1). 524,586 parameters at c1 = 256."""
    return nn.Sequential(
        Conv2d(2, 2, (3, 3), bias=True, kernels_by=model.kernels_by),
        BatchNorm2d(2),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Flatten(),
        Linear(model.reals, model.c1),
    )


def tail(model: ModelSettings) -> list[nn.Module]:
    """Decoder tail F2 as a list of layers: (B, c1) → (B, c2). 1,053,768 parameters at c = 256."""
    return [
        Linear(model.c1, model.reals),
        nn.Unflatten(1, model.image),
        Conv2d(2, 2, (3, 3), bias=True, kernels_by=model.kernels_by),
        nn.LeakyReLU(SLOPE),
        CRBlock(model.kernels, model.kernels_by),
        CRBlock(model.kernels, model.kernels_by),
        nn.Flatten(),
        Linear(model.reals, model.c2 or model.c1),
    ]


def head(model: ModelSettings) -> nn.Sequential:
    """Decoder head F3: (B, c2) → (B, 2, A, D) in [0, 1]. 526,336 parameters at c2 = 256.

    With `model.head` crblock, a CRBlock refines the linear layer's image.

    The hard-sigmoid is PyTorch's, clamp(x/6 + 1/2, 0, 1). The layer before it starts at a tenth of
    PyTorch's usual range, which the paper leaves open: the first reconstructions are then close to
    0.5, an empty channel, instead of noise that takes hundreds of iterations to unlearn.
    """
    last = Linear(model.c2 or model.c1, model.reals)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.mul_(0.1)
    image: list[nn.Module] = [last, nn.Unflatten(1, model.image)]
    if model.head == "crblock":
        block = CRBlock(model.kernels, model.kernels_by)
        norm = block.join[-1]
        assert isinstance(norm, BatchNorm2d)
        nn.init.zeros_(norm.weight)  # its branch begins at zero, not with noise of order 1
        image.append(block)
    return nn.Sequential(*image, nn.Hardsigmoid())
