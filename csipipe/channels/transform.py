"""Between complex angular-delay channels and [0, 1] images.

Shapes: B rows, A angles, D delays. Everything here is linear, nothing in dB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.source import Images

Complex = NDArray[np.complex64]

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
    """
    c = to_complex(h[..., :delays])
    antennas = np.fft.ifft(c, axis=1)[:, :angles]
    return to_unit(np.fft.fft(antennas, axis=1))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Ports of an array; the default is one line of antennas."""

    columns: int = 0
    """N1; 0: all ports."""
    rows: int = 1
    """N2."""
    polarisations: int = 1
    order: tuple[str, ...] = ("polarisation", "column", "row")
    """How ports are numbered, the slowest first: 3GPP's order, p = pol N1 N2 + n1 N2 + n2 (TS
    38.214, clause 5.2.2.2)."""

    def of(self, ports: int) -> Geometry:
        """The same, of so many ports (ValueError)."""
        sure = replace(self, columns=self.columns or ports)
        if sorted(self.order) != ["column", "polarisation", "row"]:
            raise ValueError(
                f"the order of ports is {' '.join(self.order)!r}; expected polarisation, column "
                "and row, the slowest first."
            )
        if sure.columns * sure.rows * sure.polarisations != ports:
            raise ValueError(
                f"--array {sure.columns}x{sure.rows}x{sure.polarisations} has "
                f"{sure.columns * sure.rows * sure.polarisations} ports; the data has {ports}. "
                f"Give columns x rows x polarisations that multiply to {ports}."
            )
        return sure

    @property
    def planar(self) -> bool:
        """Whether it is anything but one line."""
        return self.rows * self.polarisations > 1

    def angles(self, h: Complex, in_angle: bool) -> Complex:
        """(B, ports, …) in the images' order of ports, and in angles: the DFT, divided by A.

        Args:
            in_angle: they are angles already.
        """
        sizes = {"polarisation": self.polarisations, "column": self.columns, "row": self.rows}
        grid = h.reshape(len(h), *(sizes[name] for name in self.order), *h.shape[2:])
        places = [1 + self.order.index(name) for name in ("polarisation", "column", "row")]
        grid = grid.transpose(0, *places, *range(4, grid.ndim))
        if not in_angle:
            grid = np.fft.fftn(grid, axes=(2, 3)).astype(np.complex64) / np.float32(h.shape[1])
        return grid.reshape(h.shape).astype(np.complex64, copy=False)


class Made(NamedTuple):
    """Channels on the way to images."""

    image: Complex
    """(B, A, D): the first delays, not scaled."""
    delays: Complex
    """(B, ports, K): all delays, rolled; in the data's own order of ports, or in angles if that is
    what they are."""


def to_image(
    h: Complex, geometry: Geometry, delays: int, shift: int, in_angle: bool, in_delay: bool
) -> Made:
    """Angles and delays of channels; see `convert`.

    Args:
        h: (B, ports, subcarriers), or angles and delays already.
        geometry: complete, see `Geometry.of`.
        delays: D, at most the subcarriers.
        shift: by how much delays are rolled.
    """
    c = h if in_delay else np.fft.ifft(h, axis=-1).astype(np.complex64, copy=False)
    if shift:
        c = np.roll(c, shift, axis=-1)
    return Made(geometry.angles(c[..., :delays], in_angle), c)
