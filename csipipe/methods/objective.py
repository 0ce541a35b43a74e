"""What training minimises, and what is reported of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csipipe.measure.metrics import column_sgcs, paper_loss
from csipipe.settings.config import Settings
from csipipe.settings.tables import LOSSES, found


@dataclass(frozen=True)
class Objective:
    """The loss of `train.loss`, beside the figures that don't depend on it.

    Attributes:
        minimised: (B, 2, A, D) reconstructions and originals → (B,).
        similarity: SGCS of the images' columns is reported too.
    """

    minimised: Callable[[Tensor, Tensor], Tensor]
    similarity: bool

    @classmethod
    def of(cls, settings: Settings) -> Objective:
        """That of a run."""
        return cls(found(LOSSES[settings.train.loss].function), settings.similarity)

    def __call__(self, h_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of each row, (B,): what is minimised, with its graph; the paper's loss; SGCS, if any."""
        h_hat = h_hat.float()
        minimised = self.minimised(h_hat, h)
        with torch.no_grad():
            same = self.minimised is paper_loss
            loss = minimised.detach() if same else paper_loss(h_hat, h)
            return minimised, loss, column_sgcs(h_hat, h) if self.similarity else None
