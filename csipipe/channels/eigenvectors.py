"""Eigenvectors per subband, what 3GPP's studies of CSI feedback compress (TR 38.843).

A UE with R receive antennas sees y_k = H_k x on subcarrier k, H_k of R x P ports. A subband's
eigenvector v is the principal one of the sum over its subcarriers of H_k^H H_k: of all precoders
that are common to the subband, the one that brings most energy to the UE. With a single receive
antenna and a single subcarrier, v is the channel's conjugate.

An eigenvector has any phase. Here the phase is chosen per subband, so that the entry of the
sample's reference port, the one with most energy over all subbands, is real and positive. SGCS
doesn't see phases; an encoder does, and this choice changes slowly from subband to subband.

Shapes: B samples, R receive antennas, P ports, K subcarriers, S subbands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.source import Images
from csipipe.channels.transform import RADIUS, ZERO

SUBBANDS = 13
"""Those that 3GPP's studies commonly report: 52 resource blocks in groups of 4."""


def images_of(
    h_BRPK: NDArray[np.complexfloating[Any, Any]], subbands: int = SUBBANDS
) -> NDArray[np.complex64]:
    """Principal eigenvectors: (B, P, S) complex64, of norm 1 over ports, phase fixed (see above).

    Args:
        h_BRPK: (B, R, P, K) complex channels of any scale.
        subbands: S, 1 … K; the first K % S subbands have one subcarrier more.

    Raises:
        ValueError: more subbands than subcarriers, values that aren't finite, or a subband without
            energy, which has no eigenvector; the sample is named.
    """
    count, _, ports, bins = h_BRPK.shape
    if not 1 <= subbands <= bins:
        raise ValueError(
            f"subbands is {subbands}, but the channels have {bins} subcarriers; set it to "
            f"1 … {bins}."
        )
    bad = np.flatnonzero(~np.isfinite(h_BRPK).reshape(count, -1).all(axis=1))
    if bad.size:
        raise ValueError(
            f"sample {bad[0]} (counted from 0) holds NaN or infinite values; expected finite "
            "channels. Remove such samples."
        )
    v_BPS = np.empty((count, ports, subbands), np.complex128)
    for s, part in enumerate(np.array_split(h_BRPK.astype(np.complex128), subbands, axis=3)):
        # rows of all receive antennas and subcarriers: v is their principal right singular vector
        rows_BNP = part.transpose(0, 1, 3, 2).reshape(count, -1, ports)
        peak = np.abs(rows_BNP).max(axis=(1, 2), keepdims=True)
        if empty := np.flatnonzero(peak == 0).tolist():
            raise ValueError(
                f"sample {empty[0]} (counted from 0) has no energy in subband {s} of {subbands}: "
                "there is no eigenvector. Remove such samples, or take fewer subbands."
            )
        v_BPS[:, :, s] = _principal(rows_BNP / peak)
    reference = (np.abs(v_BPS) ** 2).sum(axis=2).argmax(axis=1)
    at_reference = v_BPS[np.arange(count), reference][:, None]
    magnitude = np.abs(at_reference)
    # a subband in which the reference port is silent keeps the phase that it has
    turn = np.where(magnitude > 0, at_reference.conj() / np.where(magnitude > 0, magnitude, 1), 1)
    fixed: NDArray[np.complex64] = (v_BPS * turn).astype(np.complex64)
    return fixed


def _principal(rows_BNP: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """(B, P): the right singular vectors of the largest singular values, of norm 1."""
    conjugate = rows_BNP.conj().transpose(0, 2, 1)
    if rows_BNP.shape[1] < rows_BNP.shape[2]:  # the rows' products are the smaller matrix
        u_BN1 = np.linalg.eigh(rows_BNP @ conjugate)[1][..., -1:]
        v_BP = (conjugate @ u_BN1)[..., 0]
    else:
        v_BP = np.linalg.eigh(conjugate @ rows_BNP)[1][..., -1]
    found: NDArray[np.complex128] = v_BP / np.linalg.norm(v_BP, axis=1, keepdims=True)
    return found


def to_image(v_BPS: NDArray[np.complexfloating[Any, Any]]) -> Images:
    """Vectors of norm 1 as images, 0.5 + v/2: (B, 2, P, S) float32 in [0, 1]."""
    image = np.stack([v_BPS.real, v_BPS.imag], axis=1) * RADIUS + ZERO
    return np.clip(image, 0, 1).astype(np.float32)
