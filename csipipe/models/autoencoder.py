"""Encoder, decoder tail and decoder head, as counted in the paper (Fig. 4).

Shapes: B rows, A angles, D delays; images are (B, 2, A, D), real and imaginary part, in [0, 1].
Every part starts from a seed of its own, the same for all UEs; the tail is built whole from one
seed and cut afterwards, so that its weights don't depend on the partition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from csipipe.models.crblock import SLOPE, CRBlock
from csipipe.models.layers import Conv2d, Linear
from csipipe.settings.config import ModelSettings

T = TypeVar("T")


def _seeded(part: int, seed: int, build: Callable[[], T]) -> T:
    """Build with torch's generator seeded for this part, and leave the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence((seed, part)).generate_state(1)[0]))
        return build()


def build_encoder(model: ModelSettings, seed: int) -> nn.Sequential:
    """CsiNet's encoder F1: (B, 2, A, D) → (B, c1). 524,586 parameters at c1 = 256."""
    reals = 2 * model.angles * model.delays
    return _seeded(
        1,
        seed,
        lambda: nn.Sequential(
            Conv2d(2, 2, (3, 3), bias=True),
            nn.BatchNorm2d(2),
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Flatten(),
            Linear(reals, model.c1),
        ),
    )


def build_tail(model: ModelSettings, seed: int) -> list[nn.Module]:
    """Decoder tail F2 as a list of layers: (B, c1) → (B, c2). 1,053,768 parameters at c = 256."""
    image = (2, model.angles, model.delays)
    reals = 2 * model.angles * model.delays
    return _seeded(
        2,
        seed,
        lambda: [
            Linear(model.c1, reals),
            nn.Unflatten(1, image),
            Conv2d(2, 2, (3, 3), bias=True),
            nn.LeakyReLU(SLOPE),
            CRBlock(model.kernels),
            CRBlock(model.kernels),
            nn.Flatten(),
            Linear(reals, model.c2),
        ],
    )


def build_head(model: ModelSettings, seed: int) -> nn.Sequential:
    """Decoder head F3: (B, c2) → (B, 2, A, D) in [0, 1]. 526,336 parameters at c2 = 256.

    The hard-sigmoid is PyTorch's, clamp(x/6 + 1/2, 0, 1). The layer before it starts at a tenth of
    PyTorch's usual range, which the paper leaves open: the first reconstructions are then close to
    0.5, an empty channel, instead of noise that hundreds of iterations go into unlearning.
    """
    image = (2, model.angles, model.delays)
    reals = 2 * model.angles * model.delays

    def build() -> nn.Sequential:
        last = Linear(model.c2, reals)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.mul_(0.1)
        return nn.Sequential(last, nn.Unflatten(1, image), nn.Hardsigmoid())

    return _seeded(3, seed, build)


def tail_shapes(model: ModelSettings) -> list[tuple[int, ...]]:
    """Shape of one row before each tail layer and after the last: 9 shapes for 8 layers."""
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, model.c1)
        shapes = [tuple(x.shape[1:])]
        for layer in build_tail(model, seed=0):
            x = layer.eval()(x)
            shapes.append(tuple(x.shape[1:]))
    return shapes


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Trainable scalars of some modules (BatchNorm's running statistics are not counted)."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def count_parts(model: ModelSettings) -> dict[str, int]:
    """Trainable scalars of `encoder`, `tail` and `head`."""
    return {part: count_parameters(layers) for part, layers in _parts(model).items()}


def count_statistics(model: ModelSettings) -> dict[str, int]:
    """BatchNorm's running means and variances in `encoder`, `tail` and `head`, in scalars."""
    return {
        part: sum(b.numel() for layer in layers for b in layer.buffers() if b.is_floating_point())
        for part, layers in _parts(model).items()
    }


def _parts(model: ModelSettings) -> dict[str, list[nn.Module]]:
    """Every part's layers, without memory."""
    with torch.device("meta"):
        return {
            "encoder": [build_encoder(model, 0)],
            "tail": build_tail(model, 0),
            "head": [build_head(model, 0)],
        }
