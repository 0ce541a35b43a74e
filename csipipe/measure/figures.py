"""Sums of figures over rows, per UE: what ranks report and what tables and summaries show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csipipe.measure.metrics import to_db

WIDTH = 5
"""Columns of `Figures.sums`: rows, then the sums of loss, centred NMSE, floor and SGCS over them;
0 for SGCS where the images' columns aren't compared."""


def row_sums(
    loss_B: Tensor, floor_B: Tensor, sgcs_B: Tensor | None, counted_B: Tensor | None = None
) -> Tensor:
    """(…, B) per-sample losses, floors and, where there are any, SGCS → (…, WIDTH) float64.

    The paper's loss divides the error by ‖H‖², the centred NMSE by ‖H − 0.5‖²; the floor is the
    ratio of the two, so NMSE = loss / floor, sample by sample.

    Args:
        counted_B: which samples count, (…, B); None: all.
    """
    loss_B = loss_B.detach()
    sgcs_B = torch.zeros_like(loss_B) if sgcs_B is None else sgcs_B.detach()
    of_each = torch.stack([torch.ones_like(loss_B), loss_B, loss_B, floor_B, sgcs_B], -2).double()
    of_each[..., 2, :] /= of_each[..., 3, :]
    if counted_B is not None:
        of_each = of_each.where(counted_B[..., None, :], 0.0)
    return of_each.sum(-1)


WORST = math.inf, math.inf
"""The score of nothing."""


@dataclass(frozen=True)
class Figures:
    """Figures of every UE over some rows.

    Attributes:
        sums: (UEs, WIDTH) float64.
        left_out: UEs whose rows aren't in them, for bad values.
    """

    sums: Tensor
    left_out: frozenset[int] = frozenset()

    def _means(self, column: int) -> list[float]:
        return [float(v) for v in self.sums[:, column] / self.sums[:, 0].clamp(min=1)]

    def _mean(self, per_ue: list[float]) -> float:
        """Over the UEs that have rows: one that was left out of a step has none."""
        return sum(per_ue) / max(1, int((self.sums[:, 0] > 0).sum()))

    @property
    def loss_per_ue(self) -> list[float]:
        """The paper's loss, mean over a UE's rows."""
        return self._means(1)

    @property
    def nmse_per_ue(self) -> list[float]:
        """Centred NMSE, linear, mean of per-sample ratios."""
        return self._means(2)

    @property
    def loss(self) -> float:
        """The paper's loss, mean over UEs."""
        return self._mean(self.loss_per_ue)

    @property
    def nmse_db(self) -> float:
        """Centred NMSE in dB of the mean over UEs of the linear NMSE."""
        return to_db(self._mean(self.nmse_per_ue))

    @property
    def floor(self) -> float:
        """The paper's loss of a constant 0.5, mean over UEs."""
        return self._mean(self._means(3))

    @property
    def sgcs_per_ue(self) -> list[float]:
        """SGCS of the images' columns, mean over a UE's rows."""
        return self._means(4)

    @property
    def sgcs(self) -> float:
        """SGCS of the images' columns, mean over UEs."""
        return self._mean(self.sgcs_per_ue)

    def score(self, similarity: bool) -> tuple[float, float]:
        """By what the best weights are chosen, the lower the better; `WORST` if it isn't finite.

        How many UEs are left out, since means over different UEs don't compare; then NMSE in dB, or
        1 - SGCS.

        Args:
            similarity: SGCS compares the columns of the images, see `Settings.similarity`.
        """
        mean = 1 - self.sgcs if similarity else self.nmse_db
        return (len(self.left_out), mean) if math.isfinite(mean) else WORST

    def named(self, similarity: bool) -> dict[str, float]:
        """Means over UEs by the names that JSON has; arguments as `score`."""
        means = {"loss": self.loss, "nmse_db": self.nmse_db}
        return means | ({"sgcs": self.sgcs} if similarity else {})

    def summary(self, similarity: bool = False) -> dict[str, Any]:
        """The `test` entry of `summary.json`, of the UEs that have rows; arguments as `score`."""
        rows = zip(self.loss_per_ue, self.nmse_per_ue, self.sgcs_per_ue, strict=True)
        return {
            **self.named(similarity),
            "floor_loss": self.floor,
            "per_ue": [
                {"ue": ue, "loss": loss, "nmse_db": to_db(nmse)}
                | ({"sgcs": sgcs} if similarity else {})
                for ue, (loss, nmse, sgcs) in enumerate(rows)
                if self.sums[ue, 0] > 0
            ],
        }

    def check(self, iteration: int) -> None:
        """Refuse to continue with a loss that isn't finite.

        Raises:
            FloatingPointError: naming the UE and the iteration.
        """
        for ue, loss in enumerate(self.loss_per_ue):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of UE {ue} is {loss} at iteration {iteration + 1}; a lower "
                    "train.lr usually helps."
                )
