"""What range a quantiser gets, learned from the codewords of training rows."""

from __future__ import annotations

from torch import Tensor

from csipipe.export.quantiser import Quantiser


def learn(z_BC: Tensor, bits: int) -> Quantiser:
    raise NotImplementedError
