"""What a run's directory is called unless `run.dir` says so; without PyTorch, as jobs use it."""

from __future__ import annotations

import re

from csipipe.settings.config import ModelSettings, Settings


def title(settings: Settings) -> str:
    """Method, model where it isn't the paper's, environment: `csilocal-crnet-indoor`."""
    model = settings.model.name
    shown = [] if model == ModelSettings.name else [model]
    words = [settings.method, *shown, str(settings.data.environment)]
    return "-".join(re.sub(r"[^\w.]+", "-", word) for word in words)
