"""Compares exported files with the modules that they were made from, on real channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from csipipe.export.formats import Function
from csipipe.export.parts import Pair, nmse_db, run

BOUND = 1e-5
"""Largest difference that passes, relative to the largest magnitude compared. fp32 sums of 2,048
products in another order differ by about 1e-7 of it."""


@dataclass(frozen=True)
class Difference:
    """Exported files beside the original, over some rows.

    Attributes:
        encoder: largest difference of a codeword entry, relative to the largest entry; with a
            quantiser, how far the original entry is outside the cell that the exported bits name.
        decoder: largest difference of a reconstructed value (in [0, 1]), on the same codewords.
        bits: how many bits of the codewords differ, and out of how many; without a quantiser, 0
            of 0.
        nmse_db: of the exported pair, one after the other.
    """

    encoder: float
    decoder: float
    bits: tuple[int, int]
    nmse_db: float

    def check(self, what: str) -> None:
        """Refuse (RuntimeError) files that don't do what the original does."""
        for end in ("encoder", "decoder"):
            value = getattr(self, end)
            if not value <= BOUND:
                raise RuntimeError(
                    f"the exported {end} ({what}) differs from the original by {value:.1e}; at "
                    f"most {BOUND:.0e} is allowed. Nothing was written. This is a fault of the "
                    "exporter, not of the run: try the other format."
                )


def compare(pair: Pair, encoder: Function, decoder: Function, h_BAD: Tensor) -> Difference:
    """Run the exported functions and the original on `h_BAD`."""
    wanted = run(pair.encoder, h_BAD)
    found = run(encoder, h_BAD)
    bits = (0, 0)
    if pair.quantiser is None:
        far = (found - wanted).abs().max() / wanted.abs().max()
    else:
        bits = (int((found != wanted).sum()), wanted.numel())
        z_BC = run(pair.encoder[0], h_BAD)  # before the bits
        far = pair.quantiser.outside(z_BC, found).max() / z_BC.abs().max()
    h_hat, there = run(pair.decoder, found), run(decoder, found)
    worst = float((there - h_hat).abs().max())
    return Difference(float(far), worst, bits, nmse_db(there, h_BAD))
