"""Channels: where they come from, and which rows each UE gets.

Images are (B, 2, A, D) float32 in [0, 1], 0.5 for zero: real and imaginary part, angles, delays.
"""

from __future__ import annotations

from csipipe.channels.csinet import frequency_channels
from csipipe.channels.load import load_test, load_ue, rows_of
from csipipe.channels.manifest import Manifest, manifest_of
from csipipe.channels.source import Source, Span
from csipipe.channels.split import Deal, common_test, deal
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import SOURCES, found

__all__ = [
    "Deal",
    "Manifest",
    "Source",
    "Span",
    "common_test",
    "deal",
    "frequency_channels",
    "load_test",
    "load_ue",
    "manifest_of",
    "open_source",
    "rows_of",
]


def open_source(data: DataSettings, angles: int | None = None, delays: int | None = None) -> Source:
    """The source that the settings name; no file is opened yet.

    Args:
        data: source, folder and seed.
        angles: angular bins A of the images; None: all that the data has (synthetic: 32).
        delays: delay bins D of the images; None: as well.

    Raises:
        FileNotFoundError: data.path is not a folder.
        ValueError: more angles or delays than the source has.
    """
    source: Source = found(SOURCES[data.source].open)(data, angles, delays)
    return source
