"""What training minimises, and what is reported of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csipipe.measure.metrics import column_sgcs, paper_loss
from csipipe.models import kernels
from csipipe.settings.config import Settings
from csipipe.settings.tables import LOSSES, found


@dataclass(frozen=True)
class Objective:
    """The loss of `train.loss`, beside the figures that don't depend on it.

    Attributes:
        minimised: (B, 2, A, D) reconstructions and originals → (B,).
        reported: it is the paper's loss, which is reported.
        similarity: SGCS of the images' columns is reported too.
    """

    minimised: Callable[[Tensor, Tensor], Tensor]
    reported: bool
    similarity: bool

    @classmethod
    def of(cls, settings: Settings, device: torch.device | None = None) -> Objective:
        """That of a run.

        Args:
            device: where to train, by a fused kernel where there is one; None: by PyTorch.
        """
        minimised = found(LOSSES[settings.train.loss].function)
        reported = minimised is paper_loss
        if reported and device is not None:
            minimised = kernels.paper_loss(settings.model.kernels_by, device) or paper_loss
        return cls(minimised, reported, settings.similarity)

    def __call__(self, h_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of each row, (B,): what is minimised, with its graph; the paper's loss; SGCS, if any."""
        minimised = self.minimised(h_hat if self.reported else h_hat.float(), h)
        with torch.no_grad():
            loss = minimised.detach() if self.reported else paper_loss(h_hat.float(), h)
            return minimised, loss, column_sgcs(h_hat.float(), h) if self.similarity else None
