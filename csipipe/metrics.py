"""Figures of merit of a reconstruction, per sample; linear unless the name says dB.

B samples, each an image (2, A, D) of reals in [0, 1] with 0.5 for zero. Results are in the
input's dtype; a mean over samples is the caller's, who takes it in float64.
"""

from __future__ import annotations

import math

from torch import Tensor

ZERO = 0.5


def _energy(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)


def paper_loss(h_hat: Tensor, h: Tensor) -> Tensor:
    """||h_hat - h||^2 / ||h||^2 on the [0, 1] data, the offset of 0.5 included: (B,), linear.

    The CSILocal paper's loss. A constant 0.5 already scores about 2e-3 (see `floor_loss`).
    """
    assert h_hat.shape == h.shape, (h_hat.shape, h.shape)
    return _energy(h_hat - h) / _energy(h)


def centred_nmse(h_hat: Tensor, h: Tensor) -> Tensor:
    """||h_hat - h||^2 / ||h - 0.5||^2: (B,), linear.

    The convention of CsiNet, CRNet and CLNet; a constant 0.5 scores 1 (0 dB). A sample that is
    0.5 throughout has no energy: NaN or infinite.
    """
    assert h_hat.shape == h.shape, (h_hat.shape, h.shape)
    return _energy(h_hat - h) / _energy(h - ZERO)


def floor_loss(h: Tensor) -> Tensor:
    """`paper_loss` of a constant 0.5, ||h - 0.5||^2 / ||h||^2: (B,), linear."""
    return _energy(h - ZERO) / _energy(h)


def to_db(linear: float) -> float:
    """10 log10 of a ratio of energies; 0 gives minus infinity.

    Raises:
        ValueError: a negative ratio, which no energies have.
    """
    if linear < 0:
        raise ValueError(f"the ratio is {linear}; a ratio of energies is 0 at least.")
    return 10 * math.log10(linear) if linear > 0 else -math.inf if linear == 0 else math.nan
