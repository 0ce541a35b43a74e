"""Files that are written completely or not at all, locks, and files that come with csipipe."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

DAMAGED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What may come of looking into JSON or YAML that isn't what was written."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole(file: Path, partial: Path | None = None) -> Iterator[Path]:
    """A path to write to, which becomes `file` if nothing fails and is removed otherwise.

    Args:
        partial: that path, in the same folder; None: `<file>.partial`.
    """
    partial = file.with_name(f"{file.name}.partial") if partial is None else partial
    try:
        with naming(file):
            yield partial
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of a full disk name `file`: a write that fails doesn't say of which file."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            error.filename = str(file)
        raise


def in_words(error: BaseException) -> str:
    """An error for the screen, with the remedy; of a full disk with the room that is left."""
    if not (isinstance(error, OSError) and error.filename):
        return str(error)
    if error.errno in _NOT_OURS:
        able = "written" if error.errno == errno.EROFS else "read or written"
        return (
            f"{os.fsdecode(error.filename)} can't be {able}: {error.strerror}. Choose another "
            "place, or change the permissions there."
        )
    if error.errno not in _NO_ROOM:
        return str(error)
    file = Path(os.fsdecode(error.filename)).absolute()
    folder = next(place for place in file.parents if place.is_dir())
    return (
        f"{os.fsdecode(error.filename)} can't be written: {error.strerror}; "
        f"{shutil.disk_usage(folder).free:,} bytes are free there. Make room, or choose a folder "
        "on another disk."
    )


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write all of `data`; one call may write less, on a nearly full disk for example.

    Args:
        file: open without a buffer, which would fail once more when it is closed.
    """
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def flush(file: Path) -> None:
    """Flush a file to disk, so that it survives a failure of the machine."""
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def write_file(file: Path, text: str) -> None:
    """Write a file, completely or not at all; creates its folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def add_line(file: Path, line: str) -> None:
    """Append a line to a file."""
    with naming(file), file.open("a", encoding="utf-8") as opened:
        opened.write(line + "\n")


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows with a header; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_file(file, text.getvalue())


def cache_folder() -> Path:
    """What may be deleted at any time: $CSIPIPE_CACHE, else csipipe in $XDG_CACHE_HOME or
    ~/.cache.

    Raises:
        OSError: this user has no home directory.
    """
    chosen = os.environ.get("CSIPIPE_CACHE")
    around = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(chosen).expanduser() if chosen else Path(around).expanduser() / "csipipe"
    except RuntimeError as error:
        raise FileNotFoundError(
            "there is no home directory for what is kept between runs (HOME isn't set); set "
            "CSIPIPE_CACHE to a folder that can be written."
        ) from error


def lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends; returns whether that succeeded.

    On a file system without locks it always succeeds.

    Args:
        wait: wait until nobody else has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def shipped(name: str) -> Path:
    """A file or folder that comes with csipipe.

    Args:
        name: its path in the repository, such as `ds_configs/fp32.json`; a wheel has the same
            folders inside of the package (see setup.py).
    """
    package = Path(__file__).resolve().parent
    inside = package / "shipped"
    return (inside if inside.is_dir() else package.parent) / name


def given_or_shipped(path: str) -> str:
    """The path that a user gave or, if nothing is there, that of the shipped file of this name."""
    ours = shipped(path)
    return str(ours) if os.path.isfile(ours) and not os.path.exists(path) else path
