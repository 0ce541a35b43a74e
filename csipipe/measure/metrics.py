"""Figures of merit of a reconstruction, per sample; linear unless the name says dB.

B samples, each an image (2, A, D) of reals in [0, 1] with 0.5 for zero. Results are in the
input's dtype; means over samples are left to the caller, who takes them in float64.

rho and SGCS compare channels bin by bin over frequency: (B, A, K) complex, A angles, K bins. Both
sides must have the same first axis. Whether that is angles, as in the images, or antennas makes no
difference to a cosine (the transform between them is unitary up to a scale), but they must not be
mixed. `HF_all` of CsiNet's files is in angles; antennas would need `torch.fft.fft(dim=1)` first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ZERO = 0.5
PADDED = 257
"""Delay bins that CsiNet pads an image to before it goes to frequency: about every fourth
subcarrier of 1024. Other data have a length of their own."""
BINS = 125
"""Frequency bins that CsiNet compares: the first of the 257, those of `HF_all`."""
HOLD = 0.1
"""Weight of the term that keeps columns at norm 1, in the loss of eigenvectors."""
SUBBANDS = 13
"""Subbands that 3GPP's studies commonly report: 52 resource blocks in groups of 4."""
SILENT = 1e-10
"""Share of a row's mean energy per bin, or per subband, up to which one is silent: after a DFT to
delays and back, unused subcarriers hold rounding errors of about 1e-14."""


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


def loss_and_floor(h_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """`paper_loss` and `floor_loss`: (B,) each, of originals (B, 2, A, D) or (T, B/T, 2, A, D)."""
    h = h.reshape(h_hat.shape)
    energy = _energy(h)
    return _energy(h_hat - h) / energy, _energy(h - ZERO) / energy


def to_frequency(h: Tensor, bins: int = BINS, padded: int = PADDED) -> Tensor:
    """Angle-frequency response of images: (B, A, bins) complex, linear.

    Delays are padded with zeros from D to `padded` and go through a DFT, as in CsiNet's published
    script; the angles stay what they are.

    Args:
        h: (B, 2, A, D) in [0, 1].
        bins: how many of the first frequency bins to return, at most `padded`.
        padded: length of the DFT, at least D.
    """
    assert h.shape[3] <= padded, (h.shape, padded)
    assert bins <= padded, (bins, padded)
    response: Tensor = torch.fft.fft(to_complex(h), n=padded, dim=2)
    return response[..., :bins]


def to_complex(h: Tensor) -> Tensor:
    """Images without their offset: (B, 2, A, D) in [0, 1] to (B, A, D) complex."""
    return torch.complex(h[:, 0] - ZERO, h[:, 1] - ZERO)


def rho(hf_hat: Tensor, hf: Tensor) -> Tensor:
    """Cosine similarity |ĥ^H h| / (||ĥ|| ||h||) per frequency bin, mean over bins: (B,), 0 … 1.

    CsiNet's ρ, with `hf_hat` = `to_frequency` of a reconstruction and `hf` = `HF_all`. It doesn't
    see a common phase or scale of a bin. A silent bin (see `SILENT`) has no direction: one of `hf`
    is left out, one of `hf_hat` alone counts as 0. NaN where all of `hf` is 0.

    Args:
        hf_hat, hf: (B, A, K) complex, the same first axis (see the module).
    """
    assert hf_hat.shape == hf.shape, (hf_hat.shape, hf.shape)
    inner = (hf_hat.conj() * hf).sum(1).abs()
    energy_hat, energy = hf_hat.abs().square().sum(1), hf.abs().square().sum(1)
    cosine = inner / (energy_hat.sqrt() * energy.sqrt())
    cosine = cosine.masked_fill(_silent(energy_hat), 0.0)
    return cosine.masked_fill(_silent(energy), torch.nan).nanmean(1)


def _silent(energy: Tensor) -> Tensor:
    """(B, bins or subbands) energies: which have no direction."""
    return energy <= SILENT * energy.mean(1, keepdim=True)


def sgcs(hf_hat: Tensor, hf: Tensor, subbands: int | None = None) -> Tensor:
    """Squared generalised cosine similarity per subband, mean over subbands: (B,), 0 … 1.

    3GPP TR 38.843 (layer 1): |v̂^H v|^2 / (||v̂||^2 ||v||^2), with v the principal eigenvector of the
    covariance over a subband's bins, Σ_k h_k h_k^H. With one bin per subband v is h itself. Silent
    subbands as in `rho`.

    Args:
        hf_hat, hf: (B, A, K) complex, the same first axis (see the module).
        subbands: 1 … K; the first K % subbands have one bin more. None: 13, or K if fewer.

    Raises:
        ValueError: more subbands than bins.
    """
    assert hf_hat.shape == hf.shape, (hf_hat.shape, hf.shape)
    return similarity(directions(hf_hat, subbands), directions(hf, subbands))


def directions(hf: Tensor, subbands: int | None = None) -> Tensor:
    """(B, A, subbands): what `sgcs` compares, the principal eigenvectors, of norm 1; raises as it.

    A silent subband (see `SILENT`) has none: NaN. Computed over the bins, which are fewer than the
    antennas: where u is the eigenvector of H^H H for the largest eigenvalue, H u has the direction.
    """
    bins = hf.shape[2]
    subbands = min(SUBBANDS, bins) if subbands is None else subbands
    if not 1 <= subbands <= bins:
        raise ValueError(f"subbands is {subbands}; there are {bins} bins. Set it to 1 … {bins}.")
    found, energies = [], []
    for h_BAK in hf.tensor_split(subbands, 2):
        u_BK = torch.linalg.eigh(h_BAK.mH @ h_BAK)[1][..., -1]
        v_BA = (h_BAK @ u_BK[..., None])[..., 0]
        found.append(v_BA / v_BA.abs().square().sum(1, keepdim=True).sqrt())
        energies.append(h_BAK.abs().square().sum((1, 2)))
    silent = _silent(torch.stack(energies, 1))
    return torch.stack(found, 2).masked_fill(silent[:, None], torch.nan)


def similarity(v_hat: Tensor, v: Tensor) -> Tensor:
    """SGCS of two sets of `directions`: (B,)."""
    cosine = (v_hat.conj() * v).sum(1).abs().square()
    cosine = cosine.masked_fill(v_hat.isnan().any(1), 0.0)
    return cosine.masked_fill(v.isnan().any(1), torch.nan).nanmean(1)


def column_sgcs(h_hat: Tensor, h: Tensor) -> Tensor:
    """SGCS of images of eigenvectors, 0.5 + v/2, subband by subband: (B,), 0 … 1.

    |v̂^H v|^2 / (||v̂||^2 ||v||^2) of each column (ports of one subband), mean over the columns, as
    3GPP TR 38.843 has it for one layer. It sees neither scale nor phase of a column; one without
    energy points nowhere and counts as 0.

    Args:
        h_hat, h: (B, 2, P, S) in [0, 1], 0.5 for zero.
    """
    assert h_hat.shape == h.shape, (h_hat.shape, h.shape)
    a, b = h_hat - ZERO, h - ZERO
    real = (a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1]).sum(1)
    imaginary = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum(1)
    energies = a.square().sum((1, 2)) * b.square().sum((1, 2))
    return ((real.square() + imaginary.square()) / energies.clamp_min(1e-24)).mean(1)


def sgcs_loss(h_hat: Tensor, h: Tensor) -> Tensor:
    """1 - `column_sgcs` + 0.1 (||v̂||^2 - 1)^2, mean over columns: (B,), 0 where both agree.

    SGCS doesn't see the length of v̂. Left alone, every step at a right angle to v̂ makes it longer,
    until the head's hard sigmoid is at its ends everywhere and no gradient is left.
    """
    length = 4 * (h_hat - ZERO).square().sum((1, 2))  # images hold v/2
    return 1 - column_sgcs(h_hat, h) + HOLD * (length - 1).square().mean(1)


def to_db(linear: float) -> float:
    """10·log10 of a ratio of energies; 0 gives minus infinity.

    Raises:
        ValueError: a negative ratio, which no energies have.
    """
    if linear < 0:
        raise ValueError(f"the ratio is {linear}; a ratio of energies is at least 0.")
    return 10 * math.log10(linear) if linear > 0 else -math.inf if linear == 0 else math.nan
