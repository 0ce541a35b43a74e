"""Runs and checkpoints as a killed run leaves them, written without training."""

from __future__ import annotations

from pathlib import Path

import torch

from csipipe import checkpoint
from csipipe.pipeline import settings as deepspeed
from csipipe.run.resuming import DEEPSPEED
from csipipe.settings import commandline
from csipipe.settings.config import Settings


def snapshot(checkpoints: Path, iteration: int, settings: Settings | None = None) -> Path:
    """A snapshot with one part."""
    partial = checkpoints / f"{iteration}.partial"
    record = checkpoint.write_part(partial, "ue-0", {"x": torch.arange(5.0)})
    settings = settings or Settings()
    content = {
        "iteration": iteration,
        "settings": commandline.plain(settings),
        DEEPSPEED: deepspeed.of(settings),
    }
    return checkpoint.commit(partial, content, {"ue-0": record})


def run_in(folder: Path, settings: Settings) -> None:
    """What a run of `settings` leaves that was killed."""
    folder.mkdir()
    (folder / "config.yaml").write_text(commandline.to_yaml(settings))
