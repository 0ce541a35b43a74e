"""The decoder tail as published CSI-feedback code writes it: stock layers, one after the other.

The same arithmetic, parameter names and initial weights as `csipipe.models.build_tail`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.models.crblock import CHANNELS, SLOPE
from csipipe.settings.config import Kernel, ModelSettings
from csipipe.settings.tables import MODELS, found


def _conv_bn(inputs: int, outputs: int, kernel: Kernel) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False), nn.BatchNorm2d(outputs)
    )


class PlainCRBlock(nn.Module):
    """CRNet's block: (B, 2, A, D) → (B, 2, A, D), with A angles and D delays."""

    def __init__(self, kernels: tuple[tuple[Kernel, ...], ...]) -> None:
        super().__init__()
        self.paths = nn.ModuleList()
        for path in kernels:
            layers: list[nn.Module] = []
            for i, kernel in enumerate(path):
                layers += [nn.LeakyReLU(SLOPE)] if i else []
                layers.append(_conv_bn(CHANNELS if i else 2, CHANNELS, kernel))
            self.paths.append(nn.Sequential(*layers))
        self.act = nn.LeakyReLU(SLOPE)
        self.join = _conv_bn(CHANNELS * len(kernels), 2, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        joined = self.join(self.act(torch.cat([path(x) for path in self.paths], dim=1)))
        out: Tensor = self.act(joined + x)
        return out


def build_tail(model: ModelSettings, seed: int) -> list[nn.Module]:
    """The tail of a model that has a plain one: (B, c1) → (B, c2)."""
    name = MODELS[model.name].plain
    assert name is not None  # checked by `candidates`
    layers: list[nn.Module] = found(name)(model)
    for layer, ours in zip(layers, models.build_tail(model, seed), strict=True):
        layer.load_state_dict(ours.state_dict())
    return layers


def tail(model: ModelSettings) -> list[nn.Module]:
    """CSILocal's tail of stock layers."""
    return [
        nn.Linear(model.c1, model.reals),
        nn.Unflatten(1, model.image),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.LeakyReLU(SLOPE),
        PlainCRBlock(model.kernels),
        PlainCRBlock(model.kernels),
        nn.Flatten(),
        nn.Linear(model.reals, model.c2 or model.c1),
    ]
