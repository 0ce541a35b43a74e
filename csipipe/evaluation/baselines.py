"""Compression without a trained model, for a given number of feedback bits: PCA, and top-k bins.

Both learn what they can from training rows, and their quantisers are those of a trained codeword
(`csipipe.export.learning`). What they make is a module, (B, 2, A, D) → the same, which is measured
as models are. Shapes: N training rows, F = 2·A·D reals of an image, C coefficients.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor, nn

from csipipe.export.learning import learn
from csipipe.export.quantiser import Quantiser
from csipipe.measure.metrics import ZERO, centred_nmse

_MOST = 10
"""Bits of a coefficient or value, at most."""
_COMPONENTS = 1024
"""PCA's, at most."""
_ROWS = 2000
"""Training rows from which quantisers are learnt; the components come from all."""
_SAMPLE = 64
"""Coefficients from which the widths of the quantisers are learnt."""


class Pca:
    """Principal components of training rows, and how much each bit of a coefficient gains.

    Args:
        h_NAD: (N, 2, A, D).
    """

    def __init__(self, h_NAD: Tensor) -> None:
        rows = h_NAD.flatten(1)
        self.mean = rows.mean(0)
        centred = rows - self.mean
        covariance = (centred.T @ centred).double() / len(rows)
        components = torch.linalg.eigh(covariance)[1].flip(1)[:, :_COMPONENTS]
        self.components = components.float().contiguous()
        z_NC = centred[:_ROWS] @ self.components
        # as many standard deviations to each side as are best for the strongest ones
        deviation = z_NC.std(0)
        strong = z_NC[:, :_SAMPLE] / deviation[:_SAMPLE].clamp(min=1e-12)
        self.quantisers = []
        errors = [z_NC.square().mean(0)]
        for bits in range(1, _MOST + 1):
            learnt = learn(strong, bits)
            half = float(learnt.step[0]) * 2**bits / (2 * float(strong[:, 0].std()))
            mean = z_NC.mean(0)
            quantiser = Quantiser(mean - half * deviation, mean + half * deviation, bits)
            self.quantisers.append(quantiser)
            errors.append((quantiser.rounded(z_NC) - z_NC).square().mean(0))
        self._gains = (torch.stack(errors[:-1]) - torch.stack(errors[1:])).T.tolist()

    def with_bits(self, total: int) -> PcaCoder:
        """The coder that spends `total` bits a row, each where it gains most."""
        waiting = [(-gains[0], entry) for entry, gains in enumerate(self._gains)]
        heapq.heapify(waiting)
        bits = [0] * len(self._gains)
        for _ in range(total):
            if not waiting:
                break
            _, entry = heapq.heappop(waiting)
            bits[entry] += 1
            if bits[entry] < _MOST:
                heapq.heappush(waiting, (-self._gains[entry][bits[entry]], entry))
        return PcaCoder(self, torch.tensor(bits))


class PcaCoder(nn.Module):
    """Coefficients with bits of their own number each; those without any are their mean."""

    mean: Tensor
    components: Tensor
    lowest: Tensor
    step: Tensor
    levels: Tensor

    def __init__(self, learnt: Pca, bits_C: Tensor) -> None:
        super().__init__()
        chosen = bits_C.nonzero()[:, 0]
        mine = [learnt.quantisers[bits - 1] for bits in bits_C[chosen].tolist()]
        places = chosen.tolist()
        tensors = {
            "mean": learnt.mean,
            "components": learnt.components[:, chosen],
            "lowest": torch.tensor([float(q.lowest[c]) for q, c in zip(mine, places, strict=True)]),
            "step": torch.tensor([float(q.step[c]) for q, c in zip(mine, places, strict=True)]),
            "levels": 2.0 ** bits_C[chosen],
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, h: Tensor) -> Tensor:
        """(B, 2, A, D) → the same."""
        z = (h.flatten(1) - self.mean) @ self.components
        level = torch.floor((z - self.lowest) / self.step).clamp(min=0).minimum(self.levels - 1)
        z_hat = self.lowest + (level + 0.5) * self.step
        return (z_hat @ self.components.T + self.mean).view_as(h)


class TopBins(nn.Module):
    """The k strongest complex bins of an image, each with its place; the others are zero.

    The places cost log2 of the ways to choose k of A·D, the values `bits` for each real.

    Args:
        h_NAD: training rows, for the range of the values.
    """

    def __init__(self, h_NAD: Tensor, bins: int, bits: int) -> None:
        super().__init__()
        self.bins = bins
        values = self._strongest(h_NAD[:_ROWS])[1]
        # a row of signs both ways: no mean of its own
        self.quantiser = learn(torch.cat([values, -values]).reshape(-1, 1), bits)

    def forward(self, h: Tensor) -> Tensor:
        """(B, 2, A, D) → the same."""
        places, values = self._strongest(h)
        rounded = self.quantiser.rounded(values.reshape(-1, 1)).view_as(values)
        image = torch.full_like(h.flatten(2), ZERO)
        return image.scatter(2, places, rounded + ZERO).view_as(h)

    def _strongest(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Places and values, each (B, 2, k)."""
        flat = h.flatten(2) - ZERO
        places = flat.square().sum(1).topk(self.bins, 1).indices
        places = places[:, None].expand(-1, 2, -1)
        return places, flat.gather(2, places)


def top_bins(h_NAD: Tensor, total: int) -> tuple[int, TopBins] | None:
    """The division of `total` bits between bins and values that is best on training rows.

    Returns:
        Bits that are used, and the coder; None: not even one bin fits.
    """
    rows, places = h_NAD[:_ROWS], h_NAD[0, 0].numel()
    found = []
    for bits in range(1, _MOST + 1):
        bins = _fitting(places, bits, total)
        if bins:
            coder = TopBins(rows, bins, bits)
            lost = float(centred_nmse(coder(rows), rows).double().nanmean())
            found.append((lost, _cost(places, bins, bits), coder))
    if not found:
        return None
    _, used, coder = min(found, key=lambda one: one[0])
    return used, coder


def _cost(places: int, bins: int, bits: int) -> int:
    """Bits of a row: which bins, and their values."""
    return (math.comb(places, bins) - 1).bit_length() + 2 * bins * bits


def _fitting(places: int, bits: int, total: int) -> int:
    """The largest number of bins that costs no more than `total`."""
    bins = 0
    while bins < places // 2 and _cost(places, bins + 1, bits) <= total:
        bins += 1
    return bins
