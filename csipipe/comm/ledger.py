"""What crosses between UEs and BTS, by kind, and the count of it: arithmetic, nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch


class Kind(Enum):
    """What a message holds; the value is its tag."""

    SMASHED = 1  # z = F1(H), UE → first stage
    OUTPUT = 2  # F2(z), last stage → UE
    OUTPUT_GRADIENT = 3  # dloss/dF2(z), UE → last stage
    SMASHED_GRADIENT = 4  # dloss/dz, first stage → UE
    ACTIVATION = 5  # stage → next stage
    ACTIVATION_GRADIENT = 6  # stage → stage before
    REPORT = 7  # figures per UE (losses, not data), UE → rank 0
    DECISION = 8  # rank 0 → everyone
    WEIGHTS = 9  # → rank 0, to be saved
    UPDATE = 10  # federated: change of the shared parts, or their gradient, UE → BTS
    MEAN_UPDATE = 11  # its mean over UEs, BTS → UE
    STATISTICS = 12  # federated: change of BatchNorm's running statistics, UE → BTS
    MEAN_STATISTICS = 13  # its mean over UEs, BTS → UE
    ROLL_CALL = 14  # which UEs take part, first stage → everyone
    VERDICT = 15  # which of them stay, last stage → everyone
    MISSED = 16  # federated: what changed since a UE last took part, BTS → UE
    MISSED_STATISTICS = 17  # the same of BatchNorm's running statistics, BTS → UE


PAPER = (
    Kind.SMASHED,
    Kind.OUTPUT,
    Kind.OUTPUT_GRADIENT,
    Kind.SMASHED_GRADIENT,
    Kind.UPDATE,
    Kind.MEAN_UPDATE,
    Kind.MISSED,
)
"""Kinds in the paper's count of exchanged parameters."""
BUFFERS = (Kind.STATISTICS, Kind.MEAN_STATISTICS, Kind.MISSED_STATISTICS)
"""Kinds that the ledger counts separately from the paper's."""
COUNTED = PAPER + BUFFERS
UP = (Kind.SMASHED, Kind.OUTPUT_GRADIENT, Kind.UPDATE, Kind.STATISTICS)
"""Counted kinds that go from a UE to the BTS; the others go down."""
PHASES = ("training", "evaluation")


class Ledger:
    """Scalars and bytes that crossed between UEs and BTS, by phase, kind and UE.

    Each end counts what it sends and what it receives, so that the UEs' sum and the BTS's sum
    must agree (`csipipe.comm.collectives.merged`). `counts` is int64 of shape
    (phase, kind, UE, 2): scalars, bytes.
    """

    def __init__(self, ues: int) -> None:
        self.counts = torch.zeros(len(PHASES), len(COUNTED), ues, 2, dtype=torch.int64)
        self.phase = "training"

    def count(self, kind: Kind, ues: Sequence[int], scalars: int, size: int) -> None:
        """Note a message of so many scalars and bytes that holds the rows of `ues`, in equal parts.

        Scalars are those that it says, however it is written; bytes are those that cross.
        """
        # NumPy takes a tenth of PyTorch's time for it, and there are two ends to each message
        cell = self.counts.numpy()[PHASES.index(self.phase), COUNTED.index(kind)]
        cell[list(ues)] += scalars // len(ues), size // len(ues)

    def total(self, phase: str, kinds: Sequence[Kind]) -> tuple[int, int]:
        """Scalars and bytes of some kinds over all UEs."""
        rows = [COUNTED.index(kind) for kind in kinds]
        scalars, size = self.counts[PHASES.index(phase), rows].sum(dim=(0, 1)).tolist()
        return int(scalars), int(size)

    def bytes_of_each(self, phase: str, kinds: Sequence[Kind]) -> list[int]:
        """Bytes of some kinds, by UE."""
        rows = [COUNTED.index(kind) for kind in kinds]
        found: list[int] = self.counts[PHASES.index(phase), rows, :, 1].sum(dim=0).tolist()
        return found
