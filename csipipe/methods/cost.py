"""What each method exchanges, from the settings alone: arithmetic, nothing is trained.

The paper's count: scalars that cross between UEs and BTS in training, over all UEs; iteration
means one exchange. BatchNorm's running statistics aren't included.
"""

from __future__ import annotations

from csipipe.models import count_parts, widths
from csipipe.settings import tables
from csipipe.settings.config import Settings


def exchanged_per_iteration(settings: Settings) -> dict[str, int]:
    """Scalars `up` (UE → BTS) and `down` in one iteration, over all UEs."""
    total = settings.participants * int(tables.found(settings.spec.cost)(settings))
    return {"up": total, "down": total}


def split(settings: Settings) -> int:
    """A UE's smashed data and gradient at its head's input.

    As much comes down: the tail's output and the gradient at the encoder's output.
    """
    return settings.train.batch_size * sum(widths(settings.model))


def shared_parts(settings: Settings) -> int:
    """The shared parts, or their gradient: a UE's up, the mean of all UEs down."""
    sizes = count_parts(settings.model)
    return sum(sizes[part] for part in settings.spec.shared)
