"""A user's own model that freezes a layer of every part, and has parameters that it never uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from csipipe.models.layers import Linear


class Spare(nn.Linear):
    """A linear layer beside a parameter that gets no gradient."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.spare = nn.Parameter(torch.ones(3))


def frozen(width: int) -> nn.Module:
    """A layer that doesn't learn."""
    return Linear(width, width).requires_grad_(False)


def build(angles: int, delays: int, c1: int, c2: int | None) -> tuple[Any, Any, Any]:
    """Layers `frozen`, `Spare` and BatchNorm in every part."""
    reals, width = 2 * angles * delays, c2 or c1
    encoder = nn.Sequential(nn.Flatten(), frozen(reals), Spare(reals, c1), nn.BatchNorm1d(c1))
    tail = [Spare(c1, c1), frozen(c1), nn.BatchNorm1d(c1), Spare(c1, width)]
    head = nn.Sequential(
        frozen(width),
        Spare(width, reals),
        nn.BatchNorm1d(reals),
        nn.Unflatten(1, (2, angles, delays)),
        nn.Sigmoid(),
    )
    return encoder, tail, head
