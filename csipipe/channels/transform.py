"""Between complex angular-delay channels and [0, 1] images.

Shapes: B rows, A angles, D delays. Everything here is linear, nothing in dB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.source import Images

ZERO = 0.5
"""The image value that stands for a zero of the channel."""
RADIUS = 0.5
"""Largest magnitude of a scaled channel: the [0, 1] range's half width."""


def to_unit(c: NDArray[np.complexfloating[Any, Any]]) -> Images:
    """Scale each sample by its own peak magnitude to radius 0.5 around 0.5.

    Args:
        c: (B, A, D) complex, any common scale per sample.

    Returns:
        (B, 2, A, D) float32 in [0, 1]; an all-zero sample becomes a constant 0.5.
    """
    peak = np.abs(c).max(axis=(1, 2), keepdims=True)
    scale = RADIUS / np.where(peak > 0, peak, 1)
    image = np.empty((c.shape[0], 2, *c.shape[1:]), np.float32)
    image[:, 0] = c.real * scale
    image[:, 1] = c.imag * scale
    image += np.float32(ZERO)
    # rounding may put the peak one ulp outside
    return np.clip(image, 0, 1, out=image)


def to_complex(h: Images) -> NDArray[np.complex64]:
    """Undo the offset: (B, 2, A, D) in [0, 1] to (B, A, D) complex64 of magnitude up to 0.71."""
    c = np.empty((h.shape[0], *h.shape[2:]), np.complex64)
    c.real = h[:, 0] - np.float32(ZERO)
    c.imag = h[:, 1] - np.float32(ZERO)
    return c


def shrink(h: Images, angles: int, delays: int) -> Images:
    """Cut images to a smaller array and a shorter delay window.

    The angles go back to antennas (inverse DFT), the first `angles` antennas are kept and
    transformed again, so that the result is what a smaller array would have measured, not a crop
    of directions. Of the delays, the first are kept. Each sample is rescaled by its own peak.

    Args:
        h: (B, 2, A, D) float32 in [0, 1].
        angles: antennas to keep, 1 … A.
        delays: delay bins to keep, 1 … D.

    Returns:
        (B, 2, angles, delays) float32 in [0, 1].

    Raises:
        ValueError: the data has fewer angles or delays than asked for.
    """
    for name, asked, found in (("angles", angles, h.shape[2]), ("delays", delays, h.shape[3])):
        if not 1 <= asked <= found:
            raise ValueError(
                f"model.{name} is {asked}; the data has {found}. Set it to 1 … {found}."
            )
    c = to_complex(h[..., :delays])
    antennas = np.fft.ifft(c, axis=1)[:, :angles]
    return to_unit(np.fft.fft(antennas, axis=1))
