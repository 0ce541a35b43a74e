"""An encoder whose codeword is trained for the bits that it is sent in.

Each entry is centred and scaled by what the first mini-batch showed, and rounded to the middles of
2^bits cells between two ends that are the same for all entries. The encoder learns through the
rounding as if it weren't there (straight-through; beyond the ends nothing is learnt). The ends of
least error for a Gaussian are from J. Max, *Quantizing for Minimum Distortion*, 1960, Table II.
Shapes: B rows, C codeword entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ENDS = {2: 1.991, 4: 2.682, 8: 3.945}
"""Half the width of the range by bits, in standard deviations: half the cells times a cell's."""


def end_of(bits: int) -> float:
    """The upper end of every entry's range; the lower one is its negative."""
    return _ENDS[bits]


def levels(u: Tensor, bits: int) -> Tensor:
    """Number of the cell of each scalar, 0 … 2^bits - 1; beyond an end, that of the last cell."""
    step = 2 * end_of(bits) / 2**bits
    return torch.floor((u + end_of(bits)) / step).clamp(0, 2**bits - 1)


def middles(level: Tensor, bits: int) -> Tensor:
    """What the cells stand for."""
    found: Tensor = (level + 0.5) * (2 * end_of(bits) / 2**bits) - end_of(bits)
    return found


class _Rounded(torch.autograd.Function):
    """(B, C) rounded to the middles of its cells; the gradient passes between the ends."""

    @staticmethod
    def forward(context: Any, u_BC: Tensor, bits: int) -> Tensor:
        context.save_for_backward(u_BC.abs() <= end_of(bits))
        return middles(levels(u_BC, bits), bits)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = context.saved_tensors
        return gradients[0] * inside, None


class Ranged(nn.Module):
    """An encoder with such a codeword.

    Args:
        inner: the encoder, (B, 2, A, D) → (B, C).
        entries: C.
        bits: of each entry.

    Attributes:
        centre, spread: (C,) mean and standard deviation of the first mini-batch's entries; 0 and 1
            before it.
        learnt: whether they have been set.
    """

    centre: Tensor
    spread: Tensor
    learnt: Tensor

    def __init__(self, inner: nn.Module, entries: int, bits: int) -> None:
        super().__init__()
        self.inner = inner
        self.bits = bits
        self.register_buffer("centre", torch.zeros(entries))
        self.register_buffer("spread", torch.ones(entries))
        self.register_buffer("learnt", torch.zeros((), dtype=torch.bool))

    def unrounded(self, h_BAD: Tensor) -> Tensor:
        """(B, C) as it is before it is rounded."""
        return self._normal(self.inner(h_BAD).float())

    def forward(self, h_BAD: Tensor) -> Tensor:
        z_BC = self.inner(h_BAD).float()
        if self.training and not self.learnt:
            self._learn(z_BC.detach())
        u_BC = self._normal(z_BC)
        rounded: Tensor = _Rounded.apply(u_BC, self.bits)  # type: ignore[no-untyped-call]  # torch's
        return rounded

    def _normal(self, z_BC: Tensor) -> Tensor:
        return (z_BC - self.centre) / self.spread

    def _learn(self, z_BC: Tensor) -> None:
        spread = z_BC.std(0, correction=0)
        self.centre.copy_(z_BC.mean(0))
        # an entry that never changes still needs a range
        self.spread.copy_(torch.where(spread > 0, spread, 1.0))
        self.learnt.fill_(True)


class Unrounded(nn.Module):
    """The same encoder without the rounding, but cut off at the ends."""

    def __init__(self, ranged: Ranged) -> None:
        super().__init__()
        self.ranged = ranged

    def forward(self, h_BAD: Tensor) -> Tensor:
        end = end_of(self.ranged.bits)
        return self.ranged.unrounded(h_BAD).clamp(-end, end)


def ranged(encoder: nn.Module, entries: int, bits: int | None) -> nn.Module:
    """The encoder with a codeword for that many bits; None: as it is."""
    return encoder if bits is None else Ranged(encoder, entries, bits)
