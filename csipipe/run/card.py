"""Weights to hand on: a folder with safetensors, their settings, and a card about them.

`card.json` has the digests of all other files; whoever reads the folder compares them first. The
folder looks like a run's directory, so that whatever takes a run takes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from csipipe import __version__, checkpoint
from csipipe.checkpoint import tail_file, ue_file
from csipipe.files import DAMAGED, write_file
from csipipe.run.resuming import CONFIG
from csipipe.settings import commandline
from csipipe.settings.config import RunSettings, Settings, TopologySettings

CARD, WEIGHTS = "card.json", "weights"


def write(
    folder: Path,
    settings: Settings,
    tail: dict[str, Any],
    ues: Sequence[dict[str, Any]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write weights with their card into a folder, the card last.

    Args:
        settings: of the run that trained them.
        tail, ues: states of the tail, and of encoder and head of each UE, by `<part>.<name>`.
        facts: what else the card says.

    Raises:
        OSError: it can't be written.
    """
    write_file(folder / CONFIG, commandline.to_yaml(_anonymous(settings, len(ues))))
    checkpoint.write(tail_file(folder / WEIGHTS), tail)
    for number, state in enumerate(ues):
        checkpoint.write(ue_file(folder / WEIGHTS, number), state)
    files = {str(f.relative_to(folder)): _told(f) for f in _files(folder, len(ues))}
    card = {"csipipe": __version__, **facts, "files": files}
    write_file(folder / CARD, json.dumps(card, indent=1) + "\n")
    return card


def check(folder: Path, ues: int) -> dict[str, Any]:
    """The card of a folder, once its files have been found to be those that it describes.

    Its `iterations` are null where nobody knew them.

    Raises:
        ValueError: a card that can't be read, or a file that is missing or another one.
    """
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
        told = {name: str(entry["sha256"]) for name, entry in card["files"].items()}
        if not isinstance(card["iterations"], int | None):
            raise TypeError("iterations is no number")
    except (OSError, *DAMAGED) as error:
        raise ValueError(
            f"{folder / CARD} can't be read ({error!r}); get the folder again."
        ) from error
    for file in _files(folder, ues):
        name = str(file.relative_to(folder))
        found = _told(file)["sha256"] if file.is_file() else "no such file"
        if told.get(name) != found:
            raise ValueError(
                f"{folder}: {name} isn't what {CARD} says: {found} instead of {told.get(name)} "
                "(SHA-256); get the folder again."
            )
    return card


def _files(folder: Path, ues: int) -> Iterable[Path]:
    weights = folder / WEIGHTS
    return [folder / CONFIG, tail_file(weights), *(ue_file(weights, ue) for ue in range(ues))]


def _told(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _anonymous(settings: Settings, ues: int) -> Settings:
    """What others need of the settings: no place on this machine."""
    data = settings.data
    train = replace(settings.train, init=None, deepspeed=None, device="auto", threads=None)
    if data.path is not None:
        data = replace(data, path=os.path.basename(os.path.abspath(data.path)))
    return replace(
        settings, data=data, train=train, run=RunSettings(), topology=TopologySettings(ues=ues)
    )
