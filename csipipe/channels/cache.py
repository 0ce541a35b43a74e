"""One converted copy of each .mat file per machine, which all its ranks map into memory.

A copy is an .npy file of checked float32 rows, named after the SHA-256 of its source. Beside it is
a note per source path with the size, the times and the inode for which the hash was computed, so
that an unchanged source is not hashed again, and one of what the doctor found in it. (A file can be
replaced by one of its size and time of modification, but not by one of its time of change, which no
program can set.) Files are written under a name of the process's own and renamed when complete; one
lock per cache lets one process convert while the others wait. Where a file system has no locks, or
keeps them to one node, several convert, and the copies are right all the same.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from csipipe import files
from csipipe.channels import accepted
from csipipe.channels.doctor import Finding, suspicions
from csipipe.channels.layout import HT, check_images
from csipipe.channels.matfile import count_rows, read_rows
from csipipe.channels.statistics import spaced
from csipipe.settings.config import Verdict

_VERSION = 2
"""Part of every name: raise it when conversion or its checks change, to make new copies."""
_CHECKS = 2
"""In every note of findings: raise it when the checks of a file change, to examine it again."""
_JUDGED = 2000
"""Rows of a file that are judged when it is converted."""
_TICK_NS = 20_000_000
"""Longer than a file system takes for two changes to have the same time."""
_LEFT = 3600.0
"""Seconds without a write after which a file that is being made is one that nobody goes on with."""


@dataclass(frozen=True)
class Copy:
    """The copy of one .mat file, and the state of the file that it was made of."""

    path: str
    size: int
    """Bytes of the source."""
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str
    rows: int
    unbounded: bool
    """Whether values outside of [0, 1] were let in."""

    def file(self) -> Path:
        """Where the copy is."""
        name = f"{self.sha256}.v{_VERSION}{'.unbounded' if self.unbounded else ''}.npy"
        return files.cache_folder() / name

    def is_whole(self) -> bool:
        """Whether the copy exists, with all its bytes."""
        try:
            return self.file().stat().st_size == len(_header(self.rows)) + self.bytes
        except FileNotFoundError:
            return False

    @property
    def bytes(self) -> int:
        """Bytes of the rows."""
        return self.rows * HT.width * 4

    def open(self) -> NDArray[np.float32]:
        """(rows, 2048) in [0, 1] (unless unbounded), mapped into memory, in the source's order.

        Copy-on-write: a process that writes to it changes its own pages, never the file.
        """
        # the header is ours and known: nothing in the file is interpreted
        offset = len(_header(self.rows))
        mapped = np.memmap(self.file(), np.float32, "c", offset, (self.rows, HT.width))
        return np.asarray(mapped)


def converted(source: Path, accept: Verdict = "suspicious") -> Copy:
    """The copy of a .mat file, made now if there is none; waits if another process is making it.

    Args:
        accept: the worst verdict of the doctor that isn't refused.

    Raises:
        FileNotFoundError: no such source.
        ValueError: the source is damaged or holds something else (see `matfile`, `layout`), isn't
            accepted, or changes while it is being read.
        OSError: the cache can't be written.
    """
    source = source.resolve()
    unbounded = accept == "unusable"
    copy = _noted(source, unbounded)
    if copy is None or not copy.is_whole():
        with _locked():
            copy = _noted(source, unbounded)  # another process may have made it meanwhile
            if copy is None or not copy.is_whole():
                copy = _convert(source, unbounded)
    found = findings(source, copy.sha256, lambda: suspicions(source, spaced(copy.open(), _JUDGED)))
    accepted.check(source, found, accept)
    return copy


def findings(source: Path, sha256: str, judge: Callable[[], list[Finding]]) -> list[Finding]:
    """What the doctor finds in a file, judged and said by the first process that asks.

    Args:
        source: the file, its path resolved.
        sha256: of its content.
        judge: finds it.
    """
    note = _note_file(source).with_suffix(".findings")
    if (found := _noted_findings(note, source, sha256)) is None:
        with _locked():
            if (found := _noted_findings(note, source, sha256)) is None:
                found = judge()
                text = json.dumps([_CHECKS, str(source), sha256, [asdict(one) for one in found]])
                with _published(note, len(text)) as partial:
                    partial.write_text(text)
                accepted.say(source, found)
    return found


def _noted_findings(note: Path, source: Path, sha256: str) -> list[Finding] | None:
    try:
        *noted, found = json.loads(note.read_text())
        known = noted == [_CHECKS, str(source), sha256]
        return [Finding(**one) for one in found] if known else None
    except (FileNotFoundError, *files.DAMAGED):
        return None


def digest(source: Path) -> str:
    """SHA-256 of a file, computed once as long as it is unchanged, on each machine.

    Raises:
        OSError: the file can't be read, or the cache can't be written.
    """
    source = source.resolve()
    note = _note_file(source).with_suffix(".sha256")
    if (found := _noted_digest(note, source)) is None:
        with _locked():
            if (found := _noted_digest(note, source)) is None:
                state = _settled(source)
                found = _sha256(source)
                text = json.dumps([str(source), *state, found])
                with _published(note, len(text)) as partial:
                    partial.write_text(text)
    return found


def _noted_digest(note: Path, source: Path) -> str | None:
    try:
        *noted, found = json.loads(note.read_text())
        return str(found) if noted == [str(source), *_state(source)] else None
    except (FileNotFoundError, *files.DAMAGED):
        return None


def _sha256(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(source: Path) -> tuple[int, int, int, int]:
    """Size, times of modification and of change, inode."""
    found = source.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _settled(source: Path) -> tuple[int, int, int, int]:
    """`_state`, when the clock has gone on: whoever writes later leaves a later time."""
    state = _state(source)
    if 0 <= time.time_ns() - state[2] < _TICK_NS:
        time.sleep(_TICK_NS / 1e9)
    return state


def _convert(source: Path, unbounded: bool) -> Copy:
    state = _settled(source)
    rows = count_rows(source)
    copy = Copy(str(source), *state, _sha256(source), rows, unbounded)
    if not copy.is_whole():  # the same content may be cached under another path
        with _published(copy.file(), copy.bytes) as partial:
            _write_rows(partial, copy)
            if _state(source) != state:
                raise ValueError(
                    f"{source} changed while it was being read; start again when it is complete."
                )
    note = json.dumps(asdict(copy), indent=2) + "\n"
    with _published(_note_file(source, unbounded), len(note)) as partial:
        partial.write_text(note)
    return copy


def _write_rows(partial: Path, copy: Copy) -> None:
    """Write all rows of the source to `partial`, checked."""
    if shutil.disk_usage(partial.parent).free < copy.bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    source = Path(copy.path)
    first = clipped = 0
    with (
        tqdm(total=copy.rows, unit="row", desc=f"converting {source.name}", disable=None) as bar,
        partial.open("wb", buffering=0) as file,  # see `write_all`
    ):
        files.write_all(file, _header(copy.rows))
        for values in read_rows(source, scratch=partial.parent):
            check_images(source, values, first, copy.unbounded)
            single = np.ascontiguousarray(values, np.float32)
            outside = int(np.count_nonzero((values < 0) | (values > 1)))
            if outside and not copy.unbounded:  # by a rounding: `check_images` has seen them
                clipped += outside
                single = np.clip(single, 0, 1)
            files.write_all(file, single.data.cast("B"))
            first += len(values)
            bar.update(len(values))
    if clipped:
        _print(f"{source}: {clipped:,} value(s) a rounding outside of [0, 1] were clipped.")


def _print(text: str) -> None:
    print(f"csipipe: {text}", file=sys.stderr, flush=True)


def _header(rows: int) -> bytes:
    """Header of the .npy file, so that NumPy alone can open a copy too."""
    text = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (rows, HT.width)}
    np.lib.format.write_array_header_1_0(text, described)
    return text.getvalue()


@contextmanager
def _published(file: Path, size: int) -> Iterator[Path]:
    """A path to write `size` bytes to, which becomes `file` only if all goes well.

    Raises:
        OSError: it can't be written; gives the remedy.
    """
    mine = file.with_name(f"converting.{uuid.uuid4().hex}.partial")
    with _explained(file, size), files.whole(file, mine) as partial:
        yield partial
        files.flush(partial)


@contextmanager
def _explained(file: Path, size: int) -> Iterator[None]:
    """Name file, disk space and remedy if the cache can't be written (OSError)."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a message of ours, about the source
            raise
        folder = next(place for place in file.parents if place.is_dir())
        raise OSError(
            f"the converted copy {file} can't be written: {error.strerror or error}. It takes "
            f"{size:,} bytes, and {shutil.disk_usage(folder).free:,} are free there. Make room, "
            "or set CSIPIPE_CACHE to a folder on another disk."
        ) from error


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the cache's lock until the end, or until this process is gone."""
    file = files.cache_folder() / "lock"
    with ExitStack() as opened:
        with _explained(file, 0):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context(file.open("a"))
            files.lock(lock.fileno(), wait=True)
            _tidy(file.parent)
        yield


def _tidy(folder: Path) -> None:
    """Remove what processes left that were killed while they converted."""
    for file in folder.glob("converting.*.partial"):
        with suppress(FileNotFoundError):  # finished, or removed by another process
            if time.time() - file.stat().st_mtime > _LEFT:
                file.unlink()


def _note_file(source: Path, unbounded: bool = False) -> Path:
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:32]
    return files.cache_folder() / f"{name}{'.unbounded' if unbounded else ''}.json"


def _noted(source: Path, unbounded: bool) -> Copy | None:
    """The copy of a source, if the source is unchanged."""
    state = _state(source)
    try:
        copy = Copy(**json.loads(_note_file(source, unbounded).read_text()))
        noted = (copy.size, copy.mtime_ns, copy.ctime_ns, copy.inode)
        return copy if (copy.path, noted) == (str(source), state) else None
    except (OSError, *files.DAMAGED):
        return None  # none yet, or damaged: make it again
