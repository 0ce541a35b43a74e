"""The methods that can train the autoencoder; `csipipe.settings.tables` lists them.

`prepare` does what a rank can do alone (checks, data), so that user errors show before the ranks
meet; it returns a function that builds the rank's worker once they have met.
"""

from __future__ import annotations

import torch

from csipipe import models
from csipipe.methods.average import Averaged
from csipipe.methods.base import Builder, EvalRows, Worker
from csipipe.methods.rows import load, manifest
from csipipe.settings import tables
from csipipe.settings.config import Settings

__all__ = [
    "Builder",
    "EvalRows",
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
    builder: Builder = tables.found(settings.spec.prepare)(settings, rank, world_size, device)
    decay = settings.train.average
    return builder if decay is None else lambda world: Averaged(builder(world), decay)
