"""Which runs a comparison needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csipipe import models
from csipipe.reports.runs import Run, placed
from csipipe.settings.config import Settings


def runs(
    settings: Settings, names: Sequence[str], codewords: Sequence[int], out: Path, seeds: int = 1
) -> list[Run]:
    """A run for every model, codeword size and seed, each model checked.

    Args:
        seeds: how many, from `train.seed` on.

    Raises:
        ValueError: a model that can't be used; named before anything is started.
    """
    found = []
    for name in dict.fromkeys(names):  # a run named twice is one run
        for c in dict.fromkeys(codewords):
            model = replace(settings.model, name=name, c1=c)
            models.check(model)
            label = name.replace(":", "-").replace("/", "-")
            for more in range(seeds):
                train = replace(settings.train, seed=settings.train.seed + more)
                seed = f"-seed{train.seed}" if more else ""
                chosen = replace(settings, model=model, train=train)
                found.append(placed(f"{label}-c{c}{seed}", chosen, out))
    return found
