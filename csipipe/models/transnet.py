"""TransNet: two transformer layers at the UE, two at the BTS, attention within a sample.

Source: Cui, Guo, Song, "TransNet: Full Attention Network for CSI Feedback in FDD Massive MIMO
System", IEEE Wireless Communications Letters 11(5), 2022. The published code differs in two ways:
it attends across the samples of a batch (its attention takes the first axis for the sequence), and
both layers of a side are one, applied twice. Neither is in the paper, and a UE has no batch.
Shapes: B rows, A angles, D delays; a sample is T = A tokens of E = 2·D reals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from csipipe.models.initial import xavier
from csipipe.models.layers import Linear
from csipipe.settings.config import ModelSettings

HEADS, HIDDEN = 2, 2048
"""Attention heads, and the width inside a feed-forward network."""
GAIN, MIDDLE = 0.01, 0.5
"""Where the last LayerNorm starts, since images are close to their middle. From the usual 1 and 0
(+34 dB) Adam would be on its way for as many iterations as its rate goes into 1."""


class Attention(nn.Module):
    """Multi-head attention of the tokens of `x` over those of `memory`, within each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = Linear(width, width)
        self.memory = Linear(width, 2 * width)
        self.out = Linear(width, width)
        # as one matrix for all three, as the published code draws them
        bound = math.sqrt(6 / (width + 3 * width))
        for layer in (self.query, self.memory):
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.xavier_uniform_(self.out.weight)
        for layer in (self.query, self.memory, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(B, T, E), (B, T, E) → (B, T, E)."""
        q_BHTE = self._by_head(self.query(x))
        k_BHTE, v_BHTE = map(self._by_head, self.memory(memory).chunk(2, dim=-1))
        scaled = q_BHTE / math.sqrt(q_BHTE.shape[-1])
        weights = torch.softmax(scaled @ k_BHTE.transpose(-2, -1), dim=-1)
        out: Tensor = self.out((weights @ v_BHTE).transpose(1, 2).flatten(2))
        return out

    @staticmethod
    def _by_head(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)


def _feed_forward(width: int) -> nn.Sequential:
    return xavier(nn.Sequential(Linear(width, HIDDEN), nn.ReLU(), Linear(HIDDEN, width)))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network: (B, T, E) → (B, T, E)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend, self.feed = Attention(width), _feed_forward(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attend(x, x))
        out: Tensor = self.norms[1](x + self.feed(x))
        return out


class Remember(nn.Module):
    """What the decoder's layers change, and beside it what they look at: (B, T, E) → (B, 2, T, E).

    One tensor, because it crosses between stages as one.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=1)


class DecoderLayer(nn.Module):
    """Attention to itself and to the codeword, a feed-forward network: (B, 2, T, E) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend, self.look, self.feed = Attention(width), Attention(width), _feed_forward(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, both: Tensor) -> Tensor:
        x, memory = both.unbind(1)
        x = self.norms[0](x + self.attend(x, x))
        x = self.norms[1](x + self.look(x, memory))
        x = self.norms[2](x + self.feed(x))
        return torch.stack([x, memory], dim=1)


class Forget(nn.Module):
    """The first of the two: (B, 2, T, E) → (B, T, E)."""

    def forward(self, both: Tensor) -> Tensor:
        return both[:, 0]


def encoder(model: ModelSettings) -> nn.Sequential:
    """(B, 2, A, D) → (B, c1)."""
    _, tokens, delays = model.image
    width = 2 * delays
    return nn.Sequential(
        nn.Flatten(),
        nn.Unflatten(1, (tokens, width)),
        EncoderLayer(width),
        EncoderLayer(width),
        nn.Flatten(),
        xavier(Linear(tokens * width, model.c1)),
    )


def tail(model: ModelSettings) -> list[nn.Module]:
    """(B, c1) → (B, 2·A·D)."""
    _, tokens, delays = model.image
    width = 2 * delays
    last = nn.LayerNorm(width)
    if model.c2 is None:  # what it makes is the image
        nn.init.constant_(last.weight, GAIN)
        nn.init.constant_(last.bias, MIDDLE)
    return [
        xavier(Linear(model.c1, tokens * width)),
        nn.Unflatten(1, (tokens, width)),
        Remember(),
        DecoderLayer(width),
        DecoderLayer(width),
        Forget(),
        last,
        nn.Flatten(),
    ]


def head(model: ModelSettings) -> nn.Sequential:
    """The image, as it is: (B, 2·A·D) → (B, 2, A, D), not limited to [0, 1]."""
    return nn.Sequential(nn.Unflatten(1, model.image))
