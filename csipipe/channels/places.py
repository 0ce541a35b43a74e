"""What `check` and `look` accept: a folder of CsiNet's files or a converted one, or a source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from csipipe import channels
from csipipe.channels import checkup, profileplot, rawcheck
from csipipe.channels.format import Description
from csipipe.channels.source import Images, Kind, Site, Source
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import KINDS, SOURCES, SourceSpec


def built_in(source: str) -> bool:
    """Whether it names a source: NAME, or NAME:DIR of one that reads a folder."""
    name, colon, _ = source.partition(":")
    return name in SOURCES and SOURCES[name].folder == bool(colon)


def is_converted(source: str) -> bool:
    """Whether it is a folder of csipipe's own format."""
    return not built_in(source) and rawcheck.is_converted(Path(source))


def kind(source: str) -> Kind:
    """What its images hold."""
    if built_in(source):
        return _opened(source).kind
    return Description.read(Path(source)).kind if is_converted(source) else "channel"


def title(source: str) -> str:
    """What it is called in tables and pictures."""
    return source if built_in(source) else Path(source).resolve().name


def axes(source: str) -> tuple[str, str]:
    """What stands at its images' axes in pictures, see `SourceSpec.axes`."""
    if is_converted(source):
        return profileplot.labels(Description.read(Path(source)))
    if built_in(source):
        return KINDS[kind(source)].axes or SOURCES[source.partition(":")[0]].axes
    return SourceSpec.axes


def sites(source: str, environment: str | None = None) -> Sequence[Site]:
    """The environment, or all that there are.

    Raises:
        FileNotFoundError: the folder isn't there, or holds no channels.
        ValueError: there is no such environment.
    """
    if built_in(source):
        found: Sequence[Site] = _opened(source).environments
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
    if built_in(source):
        return checkup.generated(_opened(source, seed), site)
    return checkup.check_folder(Path(source), site)


def _opened(source: str, seed: int = 0) -> Source:
    """A built-in source, in its own size."""
    name, _, folder = source.partition(":")
    return channels.open_source(DataSettings(source=name, path=folder or None, seed=seed))


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
