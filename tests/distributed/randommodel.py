"""A user's own model whose parts all draw random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Noisy(nn.Module):
    """Draws without being one of PyTorch's random layers, and learns how much: a plain scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.level * torch.randn_like(x)) if self.training else x


def build(angles: int, delays: int, c1: int, c2: int | None) -> tuple[Any, Any, Any]:
    """Dropout in the encoder, two random layers in the tail, one in the head."""
    reals, width = 2 * angles * delays, c2 or c1
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(reals, c1))
    tail = [
        nn.Linear(c1, 40),
        nn.LayerNorm(40),
        nn.Dropout(0.3),
        nn.Sequential(nn.Linear(40, 40), nn.ReLU(), Noisy()),
        nn.BatchNorm1d(40),
        nn.Linear(40, width),
    ]
    head = nn.Sequential(
        nn.Dropout(0.1), nn.Linear(width, reals), nn.Unflatten(1, (2, angles, delays)), nn.Sigmoid()
    )
    return encoder, tail, head
