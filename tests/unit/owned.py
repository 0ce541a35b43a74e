"""A user's own models, good and bad, as builders of (angles, delays, c1, c2)."""

from __future__ import annotations

from typing import Any

import torch
from randommodel import build as random
from torch import Tensor, nn
from torch.nn import functional


class Own(nn.Module):
    """Draws from a generator that it owns."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, device=x.device, generator=self.generator)


def _with(**parts: Any) -> Any:
    def build(angles: int, delays: int, c1: int, c2: int | None) -> Any:
        found = dict(zip(("encoder", "tail", "head"), random(angles, delays, c1, c2), strict=True))
        return tuple((found | parts).values())

    return build


def _buffer() -> nn.Module:
    layer = nn.Linear(12, 12)
    layer.register_buffer("mask", torch.ones(12, dtype=torch.bool))
    return layer


def function_as_layer(*sizes: Any) -> Any:
    return _with(tail=[functional.relu])(*sizes)


def no_list(*sizes: Any) -> Any:
    return _with(tail=nn.Linear(12, 12))(*sizes)


def nothing_to_train(*sizes: Any) -> Any:
    return _with(encoder=nn.Flatten())(*sizes)


def half(*sizes: Any) -> Any:
    return _with(tail=[nn.Linear(12, 12).half()])(*sizes)


def strange_buffer(*sizes: Any) -> Any:
    return _with(tail=[_buffer()])(*sizes)


def own_generator(*sizes: Any) -> Any:
    return _with(tail=[nn.Linear(12, 12), Own()])(*sizes)


def wide(*sizes: Any) -> Any:
    return _with(tail=[nn.Linear(12, 12), nn.Unflatten(1, (3, 4))])(*sizes)


class Twice(nn.Module):
    """Calls a module twice that it holds once; its buffer is in no file."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.layer(x) * self.scale
        return x


def called_twice(*sizes: Any) -> Any:
    scale = torch.ones(12)
    return _with(tail=[Twice(scale), Twice(scale)])(*sizes)


def held_twice(*sizes: Any) -> Any:
    layer = nn.Linear(12, 12)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), layer, nn.ReLU(), layer)
    return _with(encoder=encoder)(*sizes)


def shared_in_tail(*sizes: Any) -> Any:
    layer = nn.Linear(12, 12)
    return _with(tail=[layer, nn.Sequential(layer, nn.ReLU())])(*sizes)


def tied(*sizes: Any) -> Any:
    found = random(*sizes)
    found[1][-1].bias = found[0][2].bias
    return found


def shared_buffer(*sizes: Any) -> Any:
    norm = nn.BatchNorm1d(12, affine=False)
    return _with(tail=[nn.Linear(12, 12), norm, nn.Linear(12, 12), norm])(*sizes)
