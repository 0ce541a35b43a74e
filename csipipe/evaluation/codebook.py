"""The enhanced Type II codebook of 3GPP: TS 38.214, 5.2.2.2.5 (release 16), one layer, R = 1.

A precoder of a subband is W1 W2 Wf^H: L beams of an oversampled DFT for each of two polarisations
(W1), M taps of a DFT over the subbands (Wf), and at most K0 coefficients of the 2L x M (W2), each
of an amplitude of 3 bits below its polarisation's and a phase of 4 bits. What a report holds is in
`Report`, in the specification's numbers; `decode` sees nothing else, and `bits` counts it. The
specification says what is reported, not how a UE chooses it: `encode` is our own.

Shapes: B samples, P = 2 N1 N2 ports (polarisation, column, row), S subbands (the specification's
N3), Q = O1 O2 rotations of the beams, N = N1 N2 beams of a rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csipipe.measure.metrics import ZERO, to_complex

ARRAYS = {(2, 1), (2, 2), (4, 1), (3, 2), (6, 1), (4, 2), (8, 1)} | {
    *((4, 3), (6, 2), (12, 1), (4, 4), (8, 2), (16, 1))
}
"""N1, N2 that the codebook is defined for (Table 5.2.2.2.1-2)."""
OVERSAMPLED = 4
_WINDOW = 19
"""Most subbands whose taps are named without a window."""
_ROW = 512
"""Samples that are encoded at once."""
_TRIED = 4
"""Rotations of the beams that a UE tries to the end."""
_ROUNDS = 5
"""How often it turns the subbands' phases."""


@dataclass(frozen=True)
class Combination:
    """A row of Table 5.2.2.2.5-1, for one layer."""

    beams: int
    """L."""
    taps: float
    """p: M = ceil(p N3)."""
    beta: float
    """K0 = ceil(beta 2 L M)."""


COMBINATIONS = {
    1: Combination(2, 1 / 4, 1 / 4),
    2: Combination(2, 1 / 4, 1 / 2),
    3: Combination(4, 1 / 4, 1 / 4),
    4: Combination(4, 1 / 4, 1 / 2),
    5: Combination(4, 1 / 4, 3 / 4),
    6: Combination(4, 1 / 2, 1 / 2),
    7: Combination(6, 1 / 4, 1 / 2),
    8: Combination(6, 1 / 4, 3 / 4),
}
"""By paramCombination-r16."""


@dataclass(frozen=True)
class Report:
    """What a UE reports, for B samples."""

    rotation: Tensor
    """(B,) q = q1 O2 + q2: i_1,1."""
    beams: Tensor
    """(B, L) n = n1 N2 + n2, rising: i_1,2."""
    taps: Tensor
    """(B, M) rising, 0 first, which is that of the strongest coefficient: i_1,5 and i_1,6."""
    reference: Tensor
    """(B, 2) amplitude of each polarisation, 1 … 15; 15 for the strongest coefficient's: i_2,3."""
    amplitude: Tensor
    """(B, 2L, M) 0 … 7, polarisation by polarisation; -1: not reported: i_1,7 and i_2,4."""
    phase: Tensor
    """(B, 2L, M) 0 … 15: i_2,5."""


class Codebook(nn.Module):
    """Images of eigenvectors through the codebook and back: (B, 2, P, S) in [0, 1], twice.

    Args:
        columns, rows: N1, N2 of an array with two polarisations.
        subbands: S.
        number: paramCombination-r16, 1 … 8.

    Raises:
        ValueError: the codebook isn't defined for this array or combination.
    """

    beams_QNn: Tensor

    def __init__(self, columns: int, rows: int, subbands: int, number: int) -> None:
        super().__init__()
        if (columns, rows) not in ARRAYS:
            known = ", ".join(f"{c}x{r}" for c, r in sorted(ARRAYS))
            raise ValueError(
                f"the enhanced Type II codebook isn't defined for {columns}x{rows} columns x rows; "
                f"it is for {known}, with two polarisations."
            )
        if number not in allowed(columns, rows):
            raise ValueError(
                f"paramCombination-r16 is {number}; for {2 * columns * rows} ports it must be one "
                f"of {', '.join(map(str, allowed(columns, rows)))}."
            )
        chosen = COMBINATIONS[number]
        self.number, self.beams = number, chosen.beams
        self.columns, self.rows, self.subbands = columns, rows, subbands
        self.taps = math.ceil(chosen.taps * subbands)
        self.most = math.ceil(chosen.beta * 2 * chosen.beams * self.taps)
        """K0."""
        across, up = _grid(columns, OVERSAMPLED), _grid(rows, OVERSAMPLED if rows > 1 else 1)
        # (q1, n1, column) and (q2, n2, row) → (q1 q2, n1 n2, column row)
        both = across[:, None, :, None, :, None] * up[None, :, None, :, None, :]
        flat = both.reshape(len(across) * len(up), columns * rows, columns * rows)
        self.register_buffer("beams_QNn", flat.to(torch.complex64))

    def forward(self, h_BPS: Tensor) -> Tensor:
        """What the BTS makes of the reports; a subband's phase isn't the original's."""
        images = []
        for h in torch.split(h_BPS, _ROW):
            v = self.decode(self.encode(to_complex(h)))
            images.append(torch.stack([v.real, v.imag], 1) / 2 + ZERO)
        return torch.cat(images)

    def bits(self, report: Report) -> Tensor:
        """(B,) bits of a report: TS 38.212, 6.3.2.1.2, with the count of coefficients in part 1."""
        present = report.amplitude.flatten(1) >= 0
        count = present.sum(1)
        n, taps = self.columns * self.rows, self.taps
        if self.subbands <= _WINDOW:
            over_taps = _width(math.comb(self.subbands - 1, taps - 1))
        else:
            over_taps = _width(2 * taps) + _width(math.comb(2 * taps - 1, taps - 1))
        fixed = _width(len(self.beams_QNn)) + _width(math.comb(n, self.beams)) + over_taps
        fixed += 2 * self.beams * taps  # the bitmap
        fixed += 4 + _width(self.most)  # the other polarisation's amplitude; how many are reported
        strongest = torch.tensor([_width(int(c)) for c in count])
        return fixed + strongest + 7 * (count - 1)

    def encode(self, v_BPS: Tensor) -> Report:
        """(B, P, S) complex precoders, of any scale and any phase of a subband, as reports."""
        count, ports, subbands = v_BPS.shape
        v_BpnS = v_BPS.reshape(count, 2, ports // 2, subbands)
        # orthogonal beams: the energy in a choice of them is the sum of theirs
        seen_QBpNS = torch.einsum("qNn,bpns->qbpNs", self.beams_QNn.conj(), v_BpnS)
        energy_QBN = seen_QBpNS.abs().square().sum((2, 4))
        best_QB, which_QBL = energy_QBN.topk(self.beams, 2)
        every = torch.arange(count, device=v_BPS.device)
        found: list[Report] = []
        # which rotation is best shows when all is quantised: those that catch most are tried
        for rotation in best_QB.sum(2).topk(min(_TRIED, len(best_QB)), 0).indices:
            beams = which_QBL[rotation, every].sort(1).values
            index = beams[:, None, :, None].expand(-1, 2, -1, subbands)
            c_BLS = seen_QBpNS[rotation, every].gather(2, index).flatten(1, 2)
            found.append(self._quantised(rotation, beams, *self._tapped(c_BLS)))
        likeness = [_likeness(self.decode(report), v_BPS) for report in found]
        chosen = torch.stack(likeness).argmax(0)
        parts = {
            name: torch.stack([getattr(report, name) for report in found])[chosen, every]
            for name in vars(found[0])
        }
        return Report(**parts)

    def decode(self, report: Report) -> Tensor:
        """(B, P, S) complex64 precoders of norm 1 over the ports."""
        count = len(report.rotation)
        reported = report.amplitude >= 0
        size = 2.0 ** (-(7 - report.amplitude) / 2) * reported
        reference = 2.0 ** (-(15 - report.reference) / 4)
        size = size * reference.repeat_interleave(self.beams, 1)[..., None]
        c_BLM = torch.polar(size, report.phase * (2 * math.pi / 16))
        time = torch.arange(self.subbands, device=size.device)
        turns = report.taps[..., None] * time * (2 * math.pi / self.subbands)
        c_BLS = c_BLM @ torch.exp(1j * turns)
        beams_BLn = self.beams_QNn[report.rotation[:, None], report.beams]
        c_BpLS = c_BLS.reshape(count, 2, self.beams, self.subbands)
        v_BPS = torch.einsum("bLn,bpLs->bpns", beams_BLn, c_BpLS).flatten(1, 2)
        norm = v_BPS.abs().square().sum(1, keepdim=True).sqrt()
        return v_BPS / norm.clamp(min=torch.finfo(torch.float32).tiny)

    def _tapped(self, c_BLS: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (B, M) and coefficients (B, 2L, M) that come closest to these of subbands.

        A subband's phase is free. At first the strongest beam's is taken out, then that against
        what the taps make of it.
        """
        every = torch.arange(len(c_BLS), device=c_BLS.device)
        strongest = c_BLS.abs().square().sum(2).argmax(1)
        turn_BS = c_BLS[every, strongest].conj()
        for _ in range(_ROUNDS):
            c_BLS = c_BLS * torch.exp(1j * turn_BS.angle())[:, None]
            c_BLF = torch.fft.fft(c_BLS, dim=2) / self.subbands
            taps = self._chosen(c_BLF.abs().square().sum(1))
            index = taps[:, None].expand(-1, c_BLS.shape[1], -1)
            c_BLM = c_BLF.gather(2, index)
            made = torch.zeros_like(c_BLF).scatter(2, index, c_BLM)
            made_BLS = torch.fft.ifft(made, dim=2)
            turn_BS = (made_BLS * c_BLS.conj()).sum(1)
        return taps, c_BLM

    def _chosen(self, energy_BF: Tensor) -> Tensor:
        """(B, M) taps with most energy, the strongest one first; within a window where there are
        many."""
        start = energy_BF.argmax(1)
        # relative to the strongest one, which is always reported and gets number 0 later
        shifted = self._from(energy_BF, start)
        if self.subbands > _WINDOW:
            # the window is 2M taps with the strongest one in it
            wide = 2 * self.taps
            places = [(torch.arange(wide) - first) % self.subbands for first in range(wide)]
            sums = [shifted[:, p].topk(self.taps, 1).values.sum(1) for p in places]
            best = torch.stack(sums, 1).argmax(1)
            inside = torch.stack([torch.zeros(self.subbands).index_fill(0, p, 1) for p in places])
            shifted = shifted * inside.to(shifted)[best]
        shifted[:, 0] = math.inf
        return (shifted.topk(self.taps, 1).indices + start[:, None]) % self.subbands

    def _from(self, x_BF: Tensor, start: Tensor) -> Tensor:
        """Rolled, so that each row begins at its `start`."""
        places = torch.arange(self.subbands, device=x_BF.device) + start[:, None]
        return x_BF.gather(1, places % self.subbands)

    def _quantised(self, rotation: Tensor, beams: Tensor, taps: Tensor, c_BLM: Tensor) -> Report:
        flat = c_BLM.flatten(1)
        top = flat.abs().argmax(1)
        row, column = top // self.taps, top % self.taps
        # the strongest coefficient becomes 1, and its tap 0: a delay common to all, which no
        # subband's direction shows
        c_BLM = c_BLM / flat.gather(1, top[:, None])[..., None]
        taps = (taps - taps.gather(1, column[:, None])) % self.subbands
        taps, order = taps.sort(1)
        c_BLM = c_BLM.gather(2, order[:, None].expand_as(c_BLM))
        size = c_BLM.abs()
        # only the K0 strongest are reported
        keep = torch.zeros_like(size.flatten(1), dtype=torch.bool)
        keep.scatter_(1, size.flatten(1).topk(self.most, 1).indices, True)
        keep = keep.view_as(size)
        halves = (size * keep).reshape(len(size), 2, -1)
        loudest = halves.amax(2)
        reference = (15 + 4 * loudest.clamp(min=2.0**-3.5).log2()).round().clamp(1, 15)
        reference.scatter_(1, (row // self.beams)[:, None], 15.0)
        below = size / 2.0 ** (-(15 - reference) / 4).repeat_interleave(self.beams, 1)[..., None]
        amplitude = (7 + 2 * below.clamp(min=1e-6).log2()).round()
        # what is far below the lowest step is better left out: fewer bits
        reported = keep & (amplitude >= -1)
        amplitude = torch.where(reported, amplitude.clamp(0, 7), -1).long()
        phase = (c_BLM.angle() * (16 / (2 * math.pi))).round().long() % 16
        return Report(rotation, beams, taps, reference.long(), amplitude, phase)


def allowed(columns: int, rows: int) -> list[int]:
    """Combinations that the specification allows for an array: by its ports."""
    ports = 2 * columns * rows
    if ports == 4:
        return [1, 2]
    return [n for n in COMBINATIONS if n < 7 or ports == 32]


def _grid(size: int, oversampled: int) -> Tensor:
    """(O, N, n): the orthogonal DFT beams of each rotation, of norm 1."""
    beam = torch.arange(size, dtype=torch.float64) * oversampled
    beam = beam + torch.arange(oversampled, dtype=torch.float64)[:, None]
    turns = beam[..., None] * torch.arange(size, dtype=torch.float64) / (oversampled * size)
    return torch.exp(2j * math.pi * turns) / math.sqrt(size)


def _width(choices: int) -> int:
    """Bits that name one of so many."""
    return max(choices - 1, 0).bit_length()


def _likeness(v_hat_BPS: Tensor, v_BPS: Tensor) -> Tensor:
    """(B,) SGCS of precoders of norm 1 with any."""
    inner = (v_hat_BPS.conj() * v_BPS).sum(1).abs().square()
    energy = v_BPS.abs().square().sum(1)
    return (inner / energy.clamp(min=torch.finfo(torch.float32).tiny)).mean(1)
