"""Uniform quantisation of codewords. Shapes: B rows, C codeword entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BITS = range(1, 17)
"""Bits per entry that a quantiser can have."""


class Quantiser(nn.Module):
    """2^bits levels per entry between its ends; a level represents the middle of its cell.

    Values beyond the ends get the first or the last level.

    Args:
        lowest, highest: (C,) ends of each entry's range.
        bits: per entry.
    """

    lowest: Tensor
    step: Tensor
    places: Tensor

    def __init__(self, lowest: Tensor, highest: Tensor, bits: int) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(
                f"{bits} bits per entry were requested; expected {BITS[0]} … {BITS[-1]}."
            )
        self.bits = bits
        width = (highest - lowest).float()
        # an entry that never changes still needs a range
        step = width.clamp(min=torch.finfo(torch.float32).tiny * 2**bits) / 2**bits
        self.register_buffer("lowest", lowest.float().clone())
        self.register_buffer("step", step)
        self.register_buffer("places", 2.0 ** torch.arange(bits - 1, -1, -1))

    def to_bits(self, z_BC: Tensor) -> Tensor:
        """(B, C) → (B, C·bits) uint8 of 0 and 1, entry by entry, the most significant bit first."""
        bits = torch.remainder(torch.floor(self._levels(z_BC)[:, :, None] / self.places), 2)
        return bits.flatten(1).to(torch.uint8)

    def from_bits(self, bits: Tensor) -> Tensor:
        """(B, C·bits) of 0 and 1 → (B, C): the middles of the cells."""
        bits_BCb = bits.reshape(-1, len(self.lowest), self.bits)
        return self._middles((bits_BCb.float() * self.places).sum(2))

    def rounded(self, z_BC: Tensor) -> Tensor:
        """(B, C) → (B, C): the values that the bits decode to."""
        return self._middles(self._levels(z_BC))

    def outside(self, z_BC: Tensor, bits: Tensor) -> Tensor:
        """(B, C): how far a codeword is outside the cells that `bits` name; 0: inside.

        Values beyond an end are measured from that end.
        """
        highest = self.lowest + 2**self.bits * self.step
        inside = torch.minimum(torch.maximum(z_BC, self.lowest), highest)
        return ((inside - self.from_bits(bits)).abs() - self.step / 2).clamp(min=0)

    def _levels(self, z_BC: Tensor) -> Tensor:
        return torch.floor((z_BC - self.lowest) / self.step).clamp(0, 2**self.bits - 1)

    def _middles(self, levels_BC: Tensor) -> Tensor:
        middles: Tensor = self.lowest + (levels_BC + 0.5) * self.step
        return middles
