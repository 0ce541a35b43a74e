"""What training minimises, and what is reported of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csipipe.measure.metrics import column_sgcs, loss_and_floor, paper_loss
from csipipe.models import kernels
from csipipe.settings.config import Settings
from csipipe.settings.tables import LOSSES, found


@dataclass(frozen=True)
class Rows:
    """Of each row, (B,).

    Attributes:
        minimised: what is minimised, with its graph.
        loss, floor: the paper's loss, and that of a constant 0.5.
        sgcs: of the images' columns, if it is reported.
    """

    minimised: Tensor
    loss: Tensor
    floor: Tensor
    sgcs: Tensor | None


@dataclass(frozen=True)
class Objective:
    """The loss of `train.loss`, beside the figures that don't depend on it.

    Attributes:
        reported: the paper's losses and floors.
        minimised: (B, 2, A, D) reconstructions and originals → (B,), instead of the paper's loss.
        similarity: SGCS of the images' columns is reported too.
    """

    reported: kernels.LossAndFloor
    minimised: Callable[[Tensor, Tensor], Tensor] | None
    similarity: bool

    @classmethod
    def of(cls, settings: Settings, device: torch.device | None = None) -> Objective:
        """That of a run.

        Args:
            device: where to train, by a fused kernel where there is one; None: by PyTorch.
        """
        fused = None
        if device is not None:
            fused = kernels.loss_and_floor(settings.model.kernels_by, device)
        minimised = found(LOSSES[settings.train.loss].function)
        instead = None if minimised is paper_loss else minimised
        return cls(fused or loss_and_floor, instead, settings.similarity)

    def __call__(self, h_hat: Tensor, h: Tensor) -> Rows:
        """Of (B, 2, A, D) reconstructions, with their graph, and originals as in `LossAndFloor`.

        Raises:
            ValueError: what is minimised isn't one number per row.
        """
        if self.minimised is None:
            minimised, floor = self.reported(h_hat, h)
            loss = minimised.detach()
        else:
            minimised = self.minimised(h_hat.float(), h.reshape(h_hat.shape))
            if minimised.shape != h_hat.shape[:1]:
                # the mean of anything else depends on how a mini-batch is cut
                raise ValueError(
                    f"the loss {getattr(self.minimised, '__name__', self.minimised)} gives "
                    f"{tuple(minimised.shape)} for {len(h_hat)} rows; expected ({len(h_hat)},): "
                    "one number per row, of which the mean is minimised."
                )
            loss, floor = self.reported(h_hat.detach(), h)
        with torch.no_grad():
            sgcs = None
            if self.similarity:
                sgcs = column_sgcs(h_hat.float(), h.reshape(h_hat.shape))
        return Rows(minimised, loss, floor, sgcs)
