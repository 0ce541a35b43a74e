"""From samples to figures: means per UE and over UEs, and how samples are distributed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from csipipe.evaluation.samples import COLUMNS
from csipipe.measure.metrics import to_db
from csipipe.models import widths
from csipipe.run.ceiling import Ceiling
from csipipe.run.trained import Trained

PERCENTILES = (5, 25, 50, 75, 95)
SHOWN = ("loss", "nmse_db", "rho", "sgcs")
"""Figures, as JSON calls them."""


@dataclass(frozen=True)
class Evaluated:
    """One run on one test set.

    Attributes:
        samples: (UEs, B, COLUMNS) float64.
        pca: fitted to the run's own training rows, on this test set; None: there is none, or they
            can't be read any more.
    """

    run: Trained
    samples: Tensor
    pca: Ceiling | None = None

    def per_ue(self) -> list[dict[str, Any]]:
        """Means over a UE's samples; NMSE: of linear values, then dB. None: there is none."""
        return [{"ue": ue, **_figures(mean)} for ue, mean in enumerate(self._means())]

    def mean(self) -> dict[str, Any]:
        """Means over UEs; NMSE: of linear values, then dB."""
        return _figures(self._means().mean(0))

    def distribution(self) -> dict[str, dict[str, float | None]]:
        """Percentiles of each figure over all UEs' samples."""
        return {name: _percentiles(self.pooled(name)) for name in SHOWN}

    def pooled(self, name: str, ue: int | None = None) -> Tensor:
        """One of `SHOWN`, sample by sample, over all UEs or of one, where a sample has it."""
        chosen = self.samples if ue is None else self.samples[ue]
        values = chosen[..., COLUMNS.index(name.removesuffix("_db"))].flatten()
        values = values[~values.isnan()]
        return 10 * values.log10() if name.endswith("_db") else values

    @property
    def empty(self) -> int:
        """Rows without energy."""
        return int((self.samples[0, :, COLUMNS.index("floor")] == 0).sum())

    def to_json(self) -> dict[str, Any]:
        """An entry of `figures.json`."""
        settings = self.run.settings
        up, down = widths(settings.model)
        return {
            "run": str(self.run.folder),
            "method": settings.method,
            "model": settings.model.name,
            "status": self.run.status,
            "weights": str(self.run.source),
            "iteration": self.run.iteration,
            "c1": up,
            "c2": down,
            "mean": self.mean(),
            "per_ue": self.per_ue(),
            "percentiles": self.distribution(),
            "ceiling": self.pca and asdict(self.pca),
        }

    def _means(self) -> Tensor:
        """(UEs, COLUMNS)."""
        return self.samples.nanmean(1)


def _figures(mean: Tensor) -> dict[str, float | None]:
    loss, floor, nmse, rho, sgcs = mean.tolist()
    return {
        "loss": loss,
        "nmse_db": _number(to_db(nmse)),
        "floor_loss": floor,
        "rho": _number(rho),
        "sgcs": _number(sgcs),
    }


def _percentiles(values: Tensor) -> dict[str, float | None]:
    if not len(values):
        return {f"p{p}": None for p in PERCENTILES}
    at = torch.tensor([p / 100 for p in PERCENTILES], dtype=values.dtype)
    ordered = values.sort().values
    places = at * (len(ordered) - 1)
    low, high = ordered[places.floor().long()], ordered[places.ceil().long()]
    found = torch.where(low == high, low, low + (high - low) * (places - places.floor()))
    return {f"p{p}": _number(v) for p, v in zip(PERCENTILES, found.tolist(), strict=True)}


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
