"""Where channels come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from csipipe.settings import tables
from csipipe.settings.sections.checks import at_least
from csipipe.settings.tables import SOURCES

Environment = str
Kind = Literal["channel", "eigenvectors"]
"""What an image holds: angles x delays, or ports x subbands."""
Verdict = Literal["good", "suspicious", "unusable"]
"""What `channels check` says of a file, from the best to the worst."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Channels: where they come from and how many rows the UEs share."""

    source: str = "synthetic"
    """Where channels come from."""
    path: str | None = None
    """Folder with the source's files; csinet: DATA_Htrainin.mat and its siblings."""
    environment: Environment | None = None
    """indoor, outdoor, or noniid: the paper's mixture, UE 0 mostly indoor, the last outdoor. files:
    a name in channels.json, or all. null: indoor; files: all, to each UE its own where there is a
    file per UE."""
    alpha: float | None = None
    """noniid: every environment's rows are divided among the UEs by Dirichlet shares of this
    parameter; the smaller, the less alike the UEs are. null: the paper's mixture of two."""
    kind: Kind | None = None
    """channel: images of angles and delays. eigenvectors: of ports and subbands. null: as the data
    has them."""
    train_samples: int | None = None
    """Training rows over all UEs. null: all rows of the source; synthetic: 8000."""
    test_samples: int | None = None
    """Rows of the common test set. null: all rows of the source; synthetic: 1000."""
    holdout: float = 0.05
    """Share of each UE's training rows kept for choosing the best weights; never trained on. They
    are whole users' where converted data has several rows of a user."""
    seed: int = 0
    """Seed of the synthetic channels and of the assignment of rows to UEs."""
    accept: Verdict = "suspicious"
    """The worst verdict of channels check on a file that is trained on. suspicious: what it calls
    so is said once. good: that is refused, too. unusable: values outside of [0, 1] are let in; NaN
    and other shapes never."""

    def __post_init__(self) -> None:
        tables.check("data.source", self.source)
        if SOURCES[self.source].folder != (self.path is not None):
            needs = [name for name, source in SOURCES.items() if source.folder]
            takes = [name for name, source in SOURCES.items() if not source.folder]
            path = "null" if self.path is None else self.path
            raise ValueError(
                f"data.source is {self.source} and data.path is {path}; {' and '.join(needs)} "
                f"need a folder in it, {', '.join(takes)} takes none (null)."
            )
        known = SOURCES[self.source].environments
        if known and self.where not in known:
            raise ValueError(
                f"data.environment is {self.environment!r}; it must be one of {', '.join(known)}."
            )
        if self.alpha is not None and self.where != "noniid":
            raise ValueError(
                f"data.alpha is {self.alpha}, but data.environment {self.where}; only noniid "
                "draws shares."
            )
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"data.alpha is {self.alpha}; it must be positive and finite.")
        for name in ("train_samples", "test_samples"):
            at_least(f"data.{name}", getattr(self, name), 1)
        if not 0 <= self.holdout < 1:
            raise ValueError(f"data.holdout is {self.holdout}; it must lie in [0, 1).")
        at_least("data.seed", self.seed, 0)

    @property
    def where(self) -> Environment:
        """The environment, or the source's usual one."""
        return self.environment or SOURCES[self.source].environment
