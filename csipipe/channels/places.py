"""What `check` and `look` accept: a folder of CsiNet's files or a converted one, or a built-in
source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from csipipe import channels
from csipipe.channels import checkup, rawcheck
from csipipe.channels.format import Description
from csipipe.channels.layout import ANGLES, DELAYS
from csipipe.channels.source import SITES, Images, Kind, Site
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import SOURCES

BUILT_IN = [name for name, source in SOURCES.items() if not source.folder]
"""Sources that may be given instead of a folder."""


def is_converted(source: str) -> bool:
    """Whether it is a folder of csipipe's own format."""
    return source not in BUILT_IN and rawcheck.is_converted(Path(source))


def kind(source: str) -> Kind:
    """What its images hold."""
    return Description.read(Path(source)).kind if is_converted(source) else "channel"


def title(source: str) -> str:
    """What it is called in tables and pictures."""
    return "generated" if source in BUILT_IN else Path(source).resolve().name


def sites(source: str, environment: str | None = None) -> Sequence[Site]:
    """The environment, or all that there are.

    Raises:
        FileNotFoundError: the folder isn't there, or holds no channels.
        ValueError: there is no such environment.
    """
    if source in BUILT_IN:
        found: Sequence[Site] = SITES
    elif is_converted(source):
        found = Description.read(Path(source)).environments
    else:
        found = checkup.environments(Path(source))
    if environment is None:
        return found
    if environment not in found:
        raise ValueError(
            f"{source} has no environment {environment!r}; expected one of {', '.join(found)}."
        )
    return [environment]


def checked(source: str, site: Site, seed: int) -> checkup.Checked:
    """One environment of CsiNet's files or of a built-in source."""
    if source in BUILT_IN:
        data = DataSettings(source=source, seed=seed)
        return checkup.generated(channels.open_source(data, ANGLES, DELAYS), site)
    return checkup.check_folder(Path(source), site)


def sets(source: str, site: Site, seed: int) -> tuple[Images, Images] | None:
    """Training and test rows of one environment; None: no file has usable ones."""
    if is_converted(source):
        return rawcheck.sets_of(Path(source), [site])[site]
    return checked(source, site, seed).sets


def beside(
    other: str, source: str, wanted: Iterable[Site], seed: int
) -> dict[str, tuple[Images, Images]]:
    """What `check --beside` compares with: training and test rows by heading.

    They are those of the same environments, or of all where none is called the same.

    Raises:
        FileNotFoundError: the folder isn't there, or holds no channels.
        ValueError: the images are of another kind, or no file has usable rows.
    """
    theirs = sites(other)
    if kind(other) != kind(source):
        raise ValueError(
            f"--beside {other}: its images are of kind {kind(other)}, those of {source} of kind "
            f"{kind(source)}; give a folder of the same kind."
        )
    found = {}
    for site in [site for site in wanted if site in theirs] or theirs:
        rows = sets(other, site, seed)
        if rows is None:
            raise ValueError(f"--beside {other}: no file has usable rows; run check on it.")
        found[f"beside: {title(other)} {site}"] = rows
    return found
