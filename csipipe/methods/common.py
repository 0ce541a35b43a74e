"""What the UEs of a federated method have in common, as the BTS keeps it: θ_global.

It is kept where the BTS steps itself (fedgrad's Adam), or where some UEs take no part in an
iteration: a UE that is back first receives θ_global minus what it last knew. Shapes: N UEs, P
scalars.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.comm.ledger import Kind
from csipipe.methods.cost import exchanged_parts
from csipipe.methods.replica import Agreed
from csipipe.settings.config import Settings

FEEDBACK = "feedback"
"""What updates lost at their codec, in a checkpoint."""
UP = (Kind.UPDATE, Kind.STATISTICS)
MEANS = (Kind.MEAN_UPDATE, Kind.MEAN_STATISTICS)
MISSED = (Kind.MISSED, Kind.MISSED_STATISTICS)
"""What crosses of the parameters and, in a model with BatchNorm, of its running statistics."""


def sizes(settings: Settings) -> dict[Kind, int]:
    """Scalars of each vector that crosses; a model without BatchNorm has no statistics."""
    update, statistics = (
        sum(count(settings.model)[part] for part in exchanged_parts(settings))
        for count in (models.count_parts, models.count_statistics)
    )
    found: dict[Kind, int] = {}
    for values, buffers in (UP, MEANS, *([MISSED] if some_are_absent(settings) else [])):
        found[values] = update
        if statistics:
            found[buffers] = statistics
    return found


def some_are_absent(settings: Settings) -> bool:
    """Whether not all UEs take part in an iteration."""
    return settings.participants < settings.topology.ues


def is_one_model(settings: Settings) -> bool:
    """Whether nothing is personal, so that after an exchange all UEs have the same model.

    A frozen part may have come from anywhere.
    """
    everything = set(settings.spec.shared) == set(models.count_parts(settings.model))
    return everything and not settings.train.frozen


def shared_modules(settings: Settings, device: torch.device) -> dict[str, nn.Module]:
    """The shared parts that learn, as they start, by name."""
    model, seed = settings.model, settings.train.seed
    parts: dict[str, nn.Module] = {
        "encoder": models.build_encoder(model, seed),
        "tail": nn.Sequential(*models.build_tail(model, seed)),
        "head": models.build_head(model, seed),
    }
    return {name: parts[name].to(device) for name in parts if name in exchanged_parts(settings)}


class Common(nn.Module):
    """Some tensors, and what each UE knows of them.

    The BTS repeats what a UE computes with what it receives, as that was read from the wire. So
    whatever a codec leaves a UE without is part of the next difference.

    Args:
        tensors: as all UEs start.
    """

    known_NP: Tensor | None

    def __init__(self, tensors: list[Tensor], settings: Settings) -> None:
        super().__init__()
        self.agreed = Agreed(tensors)
        absent, ues = some_are_absent(settings), settings.topology.ues
        self.register_buffer("known_NP", self.agreed.value.repeat(ues, 1) if absent else None)

    def restart(self) -> None:
        """All UEs start with the tensors as they are now."""
        self.agreed.refresh()
        if self.known_NP is not None:
            self.known_NP[:] = self.agreed.value

    def missed(self, ue: int) -> Tensor:
        """(P,): how far a UE is behind."""
        assert self.known_NP is not None
        return self.agreed.value - self.known_NP[ue]

    def told(self, ue: int, missed_P: Tensor) -> None:
        """A UE has received this of what it missed."""
        assert self.known_NP is not None
        self.known_NP[ue] += missed_P

    def move(self, change_P: Tensor, present: Sequence[int]) -> None:
        """Move by what the UEs that are present have received."""
        self.agreed.apply(change_P)
        if self.known_NP is not None:
            self.known_NP[list(present)] += change_P
