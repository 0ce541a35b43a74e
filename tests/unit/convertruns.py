"""What the tests of conversions share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from csipipe.channels import open_source
from csipipe.channels.command import main
from csipipe.channels.format import Description
from csipipe.channels.source import Source
from csipipe.settings.config import DataSettings

N, R, P, K = 60, 2, 8, 48  # as csifiles.channels makes them


def saved(path: Path, values: Any) -> Path:
    np.save(path, values, allow_pickle=True)
    return path


def source(folder: Path) -> Source:
    return open_source(DataSettings(source="files", path=str(folder)))


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(*words) == 1
    return capsys.readouterr().err


def everything(folder: Path) -> NDArray[np.float32]:
    """All images of a folder, in the order of its files."""
    said = Description.read(folder)
    return np.concatenate([np.load(folder / one.images.name) for one in said.sets])
