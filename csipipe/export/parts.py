"""The two ends of feedback as modules: H in, codeword out; codeword in, Ĥ out.

Shapes: B rows, C = c1 codeword entries, A angles, D delays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csipipe.export.quantiser import Quantiser
from csipipe.measure.metrics import centred_nmse, to_db
from csipipe.models import plain_layers
from csipipe.models.ranged import Ranged, Unrounded, end_of
from csipipe.run.trained import Autoencoder

BLOCK = 128
"""Rows that a model takes at once."""


class _ToBits(nn.Module):
    """(B, C) → (B, C·bits) uint8."""

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(self, z_BC: Tensor) -> Tensor:
        return self.quantiser.to_bits(z_BC)


class _FromBits(nn.Module):
    """(B, C·bits) uint8 → (B, C)."""

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(self, bits: Tensor) -> Tensor:
        return self.quantiser.from_bits(bits)


@dataclass(frozen=True)
class Pair:
    """Both ends, in evaluation mode.

    Attributes:
        encoder: (B, 2, A, D) in [0, 1] → the codeword: (B, C) float32, or, quantised,
            (B, C·bits) uint8 of 0 and 1.
        decoder: the codeword → (B, 2, A, D) in [0, 1].
        quantiser: None: the codeword is sent as it is.
    """

    encoder: nn.Sequential
    decoder: nn.Sequential
    quantiser: Quantiser | None = None

    @classmethod
    def of(cls, model: Autoencoder, quantiser: Quantiser | None = None) -> Pair:
        """Cut a UE's model where the feedback crosses; with a quantiser, put it on both sides.

        Without one, a codeword that was trained for some bits crosses as it was before them.
        """
        encoder: list[nn.Module] = [unrounded(model)]
        decoder: list[nn.Module] = [*model.tail, model.head]
        if quantiser is not None:
            encoder, decoder = [*encoder, _ToBits(quantiser)], [_FromBits(quantiser), *decoder]
        return cls(nn.Sequential(*encoder).eval(), nn.Sequential(*decoder).eval(), quantiser)

    @property
    def ends(self) -> dict[str, nn.Module]:
        """Both modules by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}


def unrounded(model: Autoencoder) -> nn.Module:
    """A UE's encoder, without the rounding that it may have been trained with."""
    encoder = model.encoder
    return Unrounded(encoder) if isinstance(encoder, Ranged) else encoder


def trained_for(model: Autoencoder) -> Quantiser | None:
    """The quantiser that a model was trained with, if any."""
    encoder = model.encoder
    if not isinstance(encoder, Ranged):
        return None
    highest = torch.full_like(encoder.centre, end_of(encoder.bits))
    return Quantiser(-highest, highest, encoder.bits)


def run(module: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A module's output for all rows, block by block."""
    with torch.no_grad():
        blocks = torch.split(rows, BLOCK)
        return torch.cat([module(block) for block in blocks])


def nmse_db(h_hat: Tensor, h: Tensor) -> float:
    """Centred NMSE: mean of linear values over the rows with energy, in dB."""
    return to_db(float(centred_nmse(h_hat, h).double().nanmean()))


def operations(module: nn.Module, row: Tensor) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one row.

    The convention of the papers on CSI feedback: one multiplication with its addition counts
    once (PyTorch's counter counts two); biases, BatchNorm (which is merged into a convolution
    when deployed), activations and the quantiser aren't counted.
    """
    with torch.no_grad(), plain_layers(), FlopCounterMode(display=False) as counter:
        module(row[:1])
    return int(counter.get_total_flops()) // 2
