"""The methods that can train the autoencoder; `csipipe.settings.tables` lists them.

`prepare` does what a rank can do alone (checks, data), so that user errors show before the ranks
meet; it returns a function that builds the rank's worker once they have met.
"""

from __future__ import annotations

import torch

from csipipe import models
from csipipe.methods.average import Averaged
from csipipe.methods.base import Builder, Worker
from csipipe.methods.cost import exchanged_parts, shared_parts
from csipipe.methods.rows import load, manifest
from csipipe.settings import tables
from csipipe.settings.config import Settings

__all__ = [
    "Builder",
    "Worker",
    "load",
    "manifest",
    "prepare",
]


def prepare(settings: Settings, rank: int, world_size: int, device: torch.device) -> Builder:
    """Check model and topology, load this rank's data, and return what builds its worker.

    Raises:
        ValueError, OSError: settings, files or data that can't be used.
    """
    models.check(settings.model)
    settings.check_comm()
    _check_exchange(settings)
    builder: Builder = tables.found(settings.spec.prepare)(settings, rank, world_size, device)
    decay = settings.train.average
    return builder if decay is None else lambda world: Averaged(builder(world), decay)


def _check_exchange(settings: Settings) -> None:
    """Refuse (ValueError) to freeze all that a method exchanges; a head may have no parameters."""
    if settings.spec.shared and not shared_parts(settings)[0]:
        empty = ", ".join(exchanged_parts(settings))
        raise ValueError(
            f"train.freeze is {settings.train.freeze}, and of the parts that {settings.method} "
            f"exchanges, only {empty} of model.name {settings.model.name} would be left, without a "
            "parameter; freeze fewer."
        )
