"""Weights to hand on, with a card: what `csipipe export --pack` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from csipipe import checkpoint
from csipipe.channels import Manifest
from csipipe.export import folder
from csipipe.export.parts import nmse_db, run
from csipipe.run import card, ceiling, trained
from csipipe.run.trained import Trained


def pack(
    source: Trained,
    ues: Sequence[int],
    h_BAD: Tensor,
    licence: str,
    out: Path,
    half: bool = False,
) -> str:
    """Write the tail and some UEs' parts, numbered from 0; returns what to print.

    Args:
        h_BAD: the run's test rows.
        half: round to float16 (`csipipe.checkpoint.halved`).

    Raises:
        ValueError, OSError: weights that can't be read or rounded, or a folder that can't be
            written.
    """
    tail, weights = source.tail_weights(), [source.ue_weights(ue) for ue in ues]
    models = source.models(ues)
    if half:
        tail, weights = checkpoint.halved(tail), [checkpoint.halved(ue) for ue in weights]
        for model, ue in zip(models, weights, strict=True):  # measured are those that are written
            model.load_state_dict(tail | ue)
    figures = [nmse_db(run(model, h_BAD), h_BAD) for model in models]
    settings, pca = source.own, ceiling.noted(source.folder)
    facts: dict[str, Any] = {
        "run": source.folder.resolve().name,
        "iterations": source.iteration,
        "method": settings.method,
        "model": asdict(settings.model),
        "seed": settings.train.seed,
        "data": _data(source),
        "ues": list(ues),
        "trained": _trained(source),
        "stored": "matrices and kernels in float16, the rest in float32" if half else "float32",
        "figures": {"nmse_db": figures, "ceiling": pca and asdict(pca)},
        "licence": licence,
    }
    with folder.whole(out, card.CARD) as place:
        told = card.write(place, settings, tail, weights, facts)
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


def _trained(source: Trained) -> dict[str, Any]:
    """How they were trained; `from`: what that run had gone on from (`train.init`)."""
    settings = source.own
    if source.status == trained.HANDED_ON:
        return dict(card.check(source.folder, settings.topology.ues).get("trained", {}))
    train = settings.train
    before: dict[str, Any] | None = None
    if train.init is not None:
        before = {"run": Path(train.init).resolve().name}
        try:
            before |= _trained(trained.read(Path(train.init)))
        except (ValueError, OSError):  # it is gone
            before["state"] = "unknown"
    return {
        "ues": settings.topology.ues,
        "rows_of_all": settings.data.train_samples,
        "environment": settings.data.environment,
        "state": source.state,
        "batch_size": train.batch_size,
        "lr": train.lr,
        "start": settings.model.start,
        "seed": train.seed,
        "from": before,
    }
