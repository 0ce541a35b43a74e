"""The range of a quantiser, learned from the codewords of training rows.

With few bits it pays to cut off the tails for finer steps, with many bits to keep them, and the
entries of a codeword differ in mean and spread. So an entry's range is its mean ± k of its standard
deviations. k, one for all entries, minimises the quantisation error of the training codewords and
is chosen for each number of bits. Shapes: B rows, C codeword entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csipipe.export.quantiser import Quantiser

WIDTHS = [0.25 * n for n in range(2, 41)]
"""Values of k to try: 0.5 … 10 standard deviations to each side."""


def learn(z_BC: Tensor, bits: int) -> Quantiser:
    """The quantiser of `bits` per entry with the smallest mean squared error on `z_BC`.

    Raises:
        ValueError: fewer than two rows, or a number of bits out of range.
    """
    if len(z_BC) < 2:
        raise ValueError(
            f"{len(z_BC)} training row(s); at least two are needed to learn a quantiser's range."
        )
    mean, deviation = z_BC.mean(0), z_BC.std(0)
    found = [Quantiser(mean - k * deviation, mean + k * deviation, bits) for k in WIDTHS]
    return min(found, key=lambda quantiser: _error(quantiser, z_BC))


def _error(quantiser: Quantiser, z_BC: Tensor) -> float:
    """Squared error per row, summed over entries."""
    lost = quantiser.rounded(z_BC) - z_BC
    return float(torch.square(lost).sum(1).mean())
