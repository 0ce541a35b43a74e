"""One UE: its private channels, encoder and decoder head, and its random generator.

What a UE computes depends on its number and the seed, never on the rank that hosts it. Shapes:
B rows, A angles, D delays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from csipipe import checkpoint
from csipipe.comm import trust
from csipipe.measure.figures import row_sums
from csipipe.methods import augment
from csipipe.methods.base import adam_of_ues, freeze
from csipipe.methods.objective import Objective
from csipipe.methods.state import AdamMoments, Unit
from csipipe.models import belong, build_encoder, build_head, start, widths
from csipipe.models.ranged import ranged
from csipipe.settings.config import Settings

_DRAWS = 1000  # distinct from the seeds of the model's parts
DRAWN = 1 + augment.DRAWN
"""Numbers that are drawn for a row of a mini-batch."""


class UserEquipment:
    """A UE's parts, rows and optimiser.

    Args:
        number: the UE's number.
        rows, holdout: (B, 2, A, D) training and held-out channels in [0, 1].
    """

    def __init__(
        self,
        number: int,
        settings: Settings,
        rows: np.ndarray,
        holdout: np.ndarray,
        device: torch.device,
    ) -> None:
        model, seed = settings.model, settings.train.seed
        self.number = number
        self.augmentation = settings.train.augmentation
        self.rows = torch.from_numpy(rows).to(device)
        self.holdout = torch.from_numpy(holdout).to(device)
        encoder, head = build_encoder(model, seed), build_head(model, seed)
        start(model, encoder, head, [torch.from_numpy(rows)])
        self.encoder = ranged(encoder, widths(model)[0], settings.feedback_bits).to(device)
        self.head = head.to(device)
        belong((self.encoder, self.head), number)
        self.frozen = settings.train.frozen
        freeze(self.parts, self.frozen)
        self.optimizer = adam_of_ues(
            {"encoder": self.encoder.parameters(), "head": self.head.parameters()}, settings.train
        )
        draws = np.random.SeedSequence((seed, _DRAWS, number)).generate_state(1)
        self.generator = torch.Generator().manual_seed(int(draws[0]))

    def draw(self, batch_size: int) -> Tensor:
        """(DRAWN, B) on the host: rows, uniformly and with replacement, and their augmentation."""
        generator, angles = self.generator, self.rows.shape[2]
        drawn = torch.zeros(DRAWN, batch_size, dtype=torch.float64)
        drawn[0] = torch.randint(len(self.rows), (batch_size,), generator=generator)
        augment.draw(self.augmentation, angles, drawn[1:], generator)
        return drawn

    def batch(self, drawn: Tensor) -> Tensor:
        """(B, 2, A, D): the mini-batch of what was drawn, (DRAWN, B)."""
        return mini_batches([self], drawn[None])[0]

    def train(self, mode: bool) -> None:
        """Put encoder and head into training or evaluation mode."""
        self.encoder.train(mode and "encoder" not in self.frozen)
        self.head.train(mode and "head" not in self.frozen)

    def unit(self) -> Unit:
        """What a checkpoint holds of this UE."""
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "head": self.head}
        return Unit(parts, AdamMoments(self.optimizer), self.generator)

    def save(self, folder: Path) -> None:
        """Write the weights of encoder and head (OSError)."""
        parts = {"encoder": self.encoder.state_dict(), "head": self.head.state_dict()}
        checkpoint.save(checkpoint.ue_file(folder, self.number), parts)

    def check_loss(self, loss: Tensor) -> None:
        """Refuse (FloatingPointError) a loss that isn't finite, before the step."""
        trust.check_loss(f"UE {self.number}", loss, self.parts)

    @property
    def parts(self) -> nn.ModuleDict:
        """Encoder and head."""
        return nn.ModuleDict({"encoder": self.encoder, "head": self.head})

    def check(self, loss: Tensor) -> None:
        """Refuse (FloatingPointError) a loss or gradients that aren't finite, before the step."""
        self.check_loss(loss)
        self.check_gradients()

    def check_gradients(self) -> None:
        """Refuse (FloatingPointError) gradients that aren't finite."""
        trust.check_gradients(f"UE {self.number}'s", self.parts.named_parameters())

    def step(self) -> None:
        """Adam on encoder and head (eqs. 6 and 8).

        Raises:
            FloatingPointError: a gradient isn't finite; nothing was changed.
        """
        self.check_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()


def mini_batches(ues: Sequence[UserEquipment], drawn: Tensor) -> Tensor:
    """(U, B, 2, A, D): the mini-batch of each UE, of what was drawn, (U, DRAWN, B)."""
    rows = ues[0].rows
    drawn = drawn.to(rows.device)
    picks_UB = drawn[:, 0].long()
    h_UBAD = rows.new_empty(*picks_UB.shape, *rows.shape[1:])
    for ue, picks, more, h in zip(ues, picks_UB, drawn[:, 1:], h_UBAD, strict=True):
        torch.index_select(ue.rows, 0, picks, out=h)  # in place: to stack them would copy all
        if ue.augmentation:
            h.copy_(augment.augmented(h, ue.augmentation, *more))
    return h_UBAD


def losses(objective: Objective, h_hat: Tensor, h: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """What is minimised per sample (B,), with its graph, and (WIDTH,) sums of the `valid` first."""
    of = objective(h_hat, h)
    sgcs = None if of.sgcs is None else of.sgcs[:valid]
    return of.minimised, row_sums(of.loss[:valid], of.floor[:valid], sgcs)
