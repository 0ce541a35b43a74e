"""Weights that published implementations and ours can both be given: numbers from a formula."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.settings.config import ModelSettings


def uniform(count: int, seed: int) -> Tensor:
    """(count,) numbers in [0, 1) that look random, from the seed by arithmetic alone."""
    x = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + seed * 78.233) * 43758.5453
    return x - x.floor()


def fill(layers: Iterable[nn.Module]) -> None:
    """Set parameters and running statistics, tensor by tensor in the order of the states."""
    tensors = [item for layer in layers for item in layer.state_dict().items()]
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(tensors):
            values = uniform(tensor.numel(), seed).view(tensor.shape)
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + values)
            elif tensor.dim() > 1:
                tensor.copy_((2 * values - 1) * (3 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.4 * values - 0.2 + (1 if name.endswith("weight") else 0))


def filled(name: str) -> tuple[nn.Module, nn.Sequential, nn.Module]:
    """Encoder, tail and head at c1 = 512, in evaluation mode.

    TransNet's layers of a side get the same weights, as in the published code.
    """
    model = ModelSettings(name=name, c1=512, angles=32, delays=32, kernels_by="torch")
    encoder, head = models.build_encoder(model, 0), models.build_head(model, 0)
    tail = nn.Sequential(*models.build_tail(model, 0))
    fill([encoder, tail, head])
    for part in (encoder, tail):
        kinds: dict[str, nn.Module] = {}
        for layer in part.children():
            first = kinds.setdefault(type(layer).__name__, layer)
            if "coderLayer" in type(layer).__name__:
                layer.load_state_dict(first.state_dict())
    return encoder.eval(), tail.eval(), head.eval()


def rows() -> Tensor:
    """(3, 2, 32, 32) in [0.3, 0.7)."""
    return (0.3 + 0.4 * uniform(3 * 2048, 99)).float().view(3, 2, 32, 32)
