"""Closed form of the truncated angular-delay image of a sum of rays.

A ray of complex gain g, spatial frequency u (cycles per antenna) and delay t (delay bins)
gives the array and the subcarriers

    H[n, k] = g exp(j 2 pi u n) exp(-j 2 pi t k / K),    n = 0 … A-1, k = 0 … K-1.

Its DFT over antennas and inverse DFT over subcarriers are Dirichlet kernels,

    g exp(j pi (A-1) (u - a/A)) S(A, u - a/A) x exp(-j pi (K-1) (t-d)/K) S(K, (t-d)/K),
    S(N, x) = sin(pi N x) / (N sin(pi x)),

so a sample is a sum of rank-one images: one matmul. The frequencies of CsiNet's `HF_all` are a
grid of F points over the same band, of which the first are kept, x exp(-j 2 pi t f / F), and
its angles are the image's. The phases split into one factor per ray,
which joins g, and one per bin, which is applied to the sum; what is left to compute per ray
and bin is real.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.layout import FREQUENCIES, GRID

Reals = NDArray[np.float64]


def kernel(turns: Reals, size: int, bins: int) -> NDArray[np.float32]:
    """sin(pi N x) / (N sin(pi (x - b/N))) for x = `turns`, N = `size`, b = 0 … bins-1.

    This is S(N, x - b/N) up to the sign (-1)^b, which belongs to the bin. The sine of the
    difference is expanded, so that only two sines and two cosines per ray are computed; in
    float64, because it cancels close to a bin.

    Args:
        turns: (B, R) in cycles per element.
        size: elements N of the array (antennas or subcarriers).
        bins: how many of the N bins to return.

    Returns:
        (B, R, bins) float32.
    """
    # A ray exactly on a bin is 0/0; a millionth of a bin beside it, the kernel is 1 - 1e-12.
    places = turns * size
    on_bin = np.abs(places - np.round(places)) < 1e-6
    x = np.where(on_bin, (np.round(places) + 1e-6) / size, turns)
    b = np.arange(bins) / size
    sine, cosine = np.sin(np.pi * x)[..., None], np.cos(np.pi * x)[..., None]
    below = sine * np.cos(np.pi * b)
    below -= cosine * np.sin(np.pi * b)
    numerator = np.sin(np.pi * size * x) / size
    ratio: NDArray[np.float32] = np.divide(numerator[..., None], below).astype(np.float32)
    return ratio


def bin_phase(size: int, bins: int) -> NDArray[np.complex128]:
    """(bins,) exp(-j pi (N-1) b/N) (-1)^b = exp(j pi b/N): what `kernel` leaves to the bins."""
    phase: NDArray[np.complex128] = np.exp(1j * np.pi * np.arange(bins) / size)
    return phase


def images_of_rays(
    gain: NDArray[np.complex128],
    frequency: Reals,
    delay: Reals,
    *,
    angles: int,
    delays: int,
    subcarriers: int,
) -> NDArray[np.complex64]:
    """Sum of rays as angular-delay images; the DFTs are scaled by 1/A and 1/K.

    Args:
        gain: (B, R) complex, linear.
        frequency: (B, R) spatial frequency, cycles per antenna (-0.5 … 0.5).
        delay: (B, R) in delay bins (1 / bandwidth).
        angles: antennas A.
        delays: delay bins D to keep, at most `subcarriers`.
        subcarriers: OFDM subcarriers K.

    Returns:
        (B, A, D) complex64.
    """
    turns = delay / subcarriers
    phase = np.pi * ((angles - 1) * frequency - (subcarriers - 1) * turns)
    g_BR = (gain * np.exp(1j * phase)).astype(np.complex64)
    over_angle_BRA = kernel(frequency, angles, angles)
    over_delay_BRD = kernel(turns, subcarriers, delays)
    # Real times complex: the complex side as interleaved reals makes it one real matmul.
    weighted_BRD = g_BR[..., None] * over_delay_BRD
    sums = np.matmul(over_angle_BRA.transpose(0, 2, 1), weighted_BRD.view(np.float32))
    image: NDArray[np.complex64] = sums.view(np.complex64)
    per_bin = np.outer(bin_phase(angles, angles), bin_phase(subcarriers, delays).conj())
    image *= per_bin.astype(np.complex64)
    return image


def frequencies_of_rays(
    gain: NDArray[np.complex128], frequency: Reals, delay: Reals, *, angles: int
) -> NDArray[np.complex64]:
    """Sum of rays over angles and frequencies, not truncated in delay: CsiNet's `HF_all`.

    The convention is that of CsiNet's evaluation: a reconstruction of 32 delays is padded with
    zeros to 257, goes through a DFT over delay and keeps the first 125 frequencies; its angles are
    not transformed back. Frequency f of the 257 is f/257 of the bandwidth, so that a ray of delay
    t (in bins) has the phase -2 pi t f / 257 there, whole delays or not.

    Args:
        gain, frequency, delay: (B, R), as `images_of_rays`.
        angles: antennas and angular bins A.

    Returns:
        (B, A, 125) complex64: the angle DFT is scaled by 1/A.
    """
    g_BR = (gain * np.exp(1j * np.pi * (angles - 1) * frequency)).astype(np.complex64)
    over_angle_BRA = kernel(frequency, angles, angles)
    # powers of the phase step between two frequencies: one complex exponential per ray
    step_BR = np.exp(-2j * np.pi * delay / GRID)
    steps_BRF = np.broadcast_to(step_BR[..., None], (*step_BR.shape, FREQUENCIES)).copy()
    steps_BRF[..., 0] = 1
    over_frequency_BRF = np.cumprod(steps_BRF, axis=2).astype(np.complex64)
    weighted_BRF = g_BR[..., None] * over_frequency_BRF
    sums = np.matmul(over_angle_BRA.transpose(0, 2, 1), weighted_BRF.view(np.float32))
    response: NDArray[np.complex64] = sums.view(np.complex64)
    response *= bin_phase(angles, angles).astype(np.complex64)[:, None]
    return response
