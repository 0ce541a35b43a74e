"""What `channels check` says of arrays that must be converted first, and of converted folders."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from csipipe.channels import doctor, rawarray
from csipipe.channels.filesource import PARTS, FilesSource
from csipipe.channels.format import NAME, Description
from csipipe.channels.reading import example, guess, lacks_parts
from csipipe.channels.source import Images, Site
from csipipe.channels.statistics import MOST_ROWS, four_fifths

ENDINGS = (".npy", ".npz", ".mat", ".h5", ".hdf5", ".csv", ".txt", ".pt", ".pth")


def raw_files(place: Path) -> list[Path]:
    """The file, or those of a folder that may hold arrays."""
    if place.is_file():
        return [place]
    return sorted(path for path in place.glob("*") if path.suffix.lower() in ENDINGS)


def raw_report(files: list[Path]) -> Iterator[str]:
    """Lines about arrays: what they are, and the command that converts each."""
    for file in files:
        yield f"{file.name}: UNUSABLE as it is"
        try:
            yield from _array_report(file)
        except rawarray.SeveralError as several:
            for name in several.names:
                yield from _array_report(file, name)


def _array_report(file: Path, key: str | None = None) -> Iterator[str]:
    """Lines about one array of a file.

    Raises:
        SeveralError: the file holds several, and no key is given.
    """
    try:
        with rawarray.opened(file, key) as array:
            text, how = example(array), "convert it, once its axes are right"
            yield f"  {array.key or 'array'} {array.dtype} {array.shape}" + (
                f"; {array.note}" if array.note else ""
            )
            if sum(size > 1 for size in array.shape) < 2:
                yield "  no channels: those have at least a sample axis and another one"
                return
            try:
                text, how = guess(array).text, "convert it"
                yield f"  the values say that the axes are: {text}"
            except ValueError as error:
                yield f"  {str(error).removeprefix(f'{array}: ')}"
                if lacks_parts(array):
                    return
    except rawarray.SeveralError:
        raise
    except (ValueError, OSError) as error:
        yield f"  {error}"
        return
    words = ["python", "-m", "csipipe", "channels", "convert", str(file), "DIR", "--axes", text]
    yield f"  {how}: {shlex.join([*words, *(['--key', key] if key else [])])}"


def is_converted(place: Path) -> bool:
    """Whether it is a folder of csipipe's own format."""
    return (place / NAME).is_file()


def sets_of(folder: Path, environments: Iterable[Site]) -> dict[str, tuple[Images, Images]]:
    """Training and test rows of these environments, some of them; see `FilesSource.rows`."""
    source, said = FilesSource(folder, 0), Description.read(folder)
    found = {}
    for environment in environments:
        some = []
        for part, names in PARTS.items():
            if said.of(environment, *names):
                most = min(source.available(environment, part), MOST_ROWS)
                some.append(source.rows(environment, part, 0, most))
        found[environment] = (some[0], some[1]) if len(some) == 2 else four_fifths(some[0])
    return found


def converted_findings(folder: Path, rows: tuple[Images, Images]) -> list[doctor.Finding]:
    """What is suspicious about converted rows."""
    said = Description.read(folder)
    if said.kind != "channel":
        return []
    found = doctor.judge_converted(rows[0], linear=not said.planar)
    known = {row.tobytes() for row in rows[0]}
    common = sum(row.tobytes() in known for row in rows[1])
    if common:
        what = f"{common:,} of {len(rows[1]):,} test rows are also training rows"
        found.append(doctor.Finding("suspicious", what, "convert with --split, by user"))
    return found
