"""Weights to hand on, with a card: what `csipipe export --pack` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from csipipe.channels import Manifest
from csipipe.export.parts import nmse_db, run
from csipipe.run import card, ceiling
from csipipe.run.trained import Trained


def pack(source: Trained, ues: Sequence[int], h_BAD: Tensor, licence: str, out: Path) -> str:
    """Write the tail and some UEs' parts, numbered from 0; returns what to print.

    Args:
        h_BAD: the run's test rows.

    Raises:
        ValueError, OSError: weights that can't be read, or a folder that can't be written.
    """
    figures = [nmse_db(run(model, h_BAD), h_BAD) for model in source.models(ues)]
    settings, pca = source.own, ceiling.noted(source.folder)
    facts: dict[str, Any] = {
        "run": source.folder.resolve().name,
        "iterations": source.iteration or 0,
        "method": settings.method,
        "model": asdict(settings.model),
        "seed": settings.train.seed,
        "data": _data(source),
        "ues": list(ues),
        "trained": {"ues": settings.topology.ues, "rows_of_all": settings.data.train_samples},
        "figures": {"nmse_db": figures, "ceiling": pca and asdict(pca)},
        "licence": licence,
    }
    weights = [source.ue_weights(ue) for ue in ues]
    told = card.write(out, settings, source.tail_weights(), weights, facts)
    lines = [f"{out}: {source.state}, licence: {licence}"]
    lines += [f"{name:>28}  {file['bytes']:>12,} bytes" for name, file in told["files"].items()]
    each = ", ".join(f"UE {ue} {db:.2f}" for ue, db in zip(ues, figures, strict=True))
    return "\n".join([*lines, f"NMSE (dB) on the run's test set: {each}"])


def _data(source: Trained) -> dict[str, Any]:
    """Which rows they were trained on."""
    data = source.own.data
    try:
        streams = Manifest.read(source.folder).streams
    except (ValueError, OSError):
        streams = {}
    return {"source": data.source, "environment": data.environment, "streams": streams}
