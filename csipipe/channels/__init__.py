"""Channels: where they come from, and which rows each UE gets.

Images are (B, 2, A, D) float32 in [0, 1], 0.5 for zero: real and imaginary part, angles, delays.
"""

from __future__ import annotations

from dataclasses import replace

from csipipe.channels.load import check_values, load_ue, rows_of
from csipipe.channels.manifest import Manifest, manifest_of
from csipipe.channels.source import Source, Span
from csipipe.channels.split import Deal, common_test, deal
from csipipe.settings.config import DataSettings, Settings
from csipipe.settings.tables import SOURCES, found

__all__ = [
    "Deal",
    "Manifest",
    "Source",
    "Span",
    "check_values",
    "common_test",
    "deal",
    "dealt",
    "load_ue",
    "manifest_of",
    "open_source",
    "rows_of",
    "sized",
    "tested",
]


def open_source(data: DataSettings, angles: int | None = None, delays: int | None = None) -> Source:
    """The source that the settings name; no file is opened yet.

    Args:
        data: source, folder and seed.
        angles: angular bins A of the images; None: all that the data has (synthetic: 32).
        delays: delay bins D of the images; None: as well.

    Raises:
        FileNotFoundError: data.path is not a folder.
        ValueError: another size or kind than the data has.
    """
    source: Source = found(SOURCES[data.source].open)(data, angles, delays)
    own = source.size
    for name, asked, there in (
        ("model.angles", angles, own[0]),
        ("model.delays", delays, own[1]),
        ("data.kind", data.kind, source.kind),
    ):
        if asked not in (None, there):
            raise ValueError(
                f"{name} is {asked}, but data.source {data.source} ({data.path or 'built in'}) has "
                f"{there}; leave {name} null to take what the data has, or give other data."
            )
    return source


def dealt(settings: Settings) -> tuple[Source, Deal]:
    """The source that the settings name, and which of its rows go to whom; no values are read yet.

    Raises:
        ValueError, OSError: as `open_source` and `deal`.
    """
    source = open_source(settings.data, settings.model.angles, settings.model.delays)
    ues = settings.topology.ues
    return source, deal(settings.data, ues, source.available, source.environments)


def tested(settings: Settings) -> tuple[Source, tuple[Span, ...]]:
    """The source that the settings name, and its rows for testing; no values are read yet.

    Raises:
        ValueError, OSError: as `open_source` and `common_test`.
    """
    source = open_source(settings.data, settings.model.angles, settings.model.delays)
    return source, common_test(settings.data, source.available, source.environments)


def sized(settings: Settings) -> Settings:
    """The same settings, with the data's own where size and kind of the images are null.

    Raises:
        ValueError, OSError: as `open_source`.
    """
    model, data = settings.model, settings.data
    source = open_source(data, model.angles, model.delays)
    angles, delays = source.size
    return replace(
        settings,
        model=replace(model, angles=angles, delays=delays),
        data=replace(data, kind=source.kind),
    )
