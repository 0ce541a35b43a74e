"""Elements of MAT v5 files, deflated or not, read without trusting any length in them.

An element is a tag (type, bytes) and its data, padded to 8 bytes; small data are in the tag itself.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import IO, NamedTuple, Protocol

from csipipe.files import write_all

_PIECE = 1 << 20
"""Bytes inflated at once."""


class DamagedError(ValueError):
    """A file isn't what it claims to be."""


class Tag(NamedTuple):
    """The start of an element."""

    kind: int
    size: int
    """Bytes of its data."""
    inside: bytes | None
    """The data, if they are in the tag."""


class Stream(Protocol):
    """Bytes of one element, from first to last (DamagedError where they end early)."""

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        ...

    def keep(self, size: int, held: IO[bytes]) -> int:
        """Skip `size` bytes; returns their position in `held`."""
        ...

    def end(self) -> None:
        """Read the rest, and check that it ends properly."""
        ...


class Plain:
    """An element that is stored plainly.

    Args:
        file: at the first byte of the element's data.
        size: bytes of them.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def take(self, size: int) -> bytes:
        self._pass(size)
        return exactly(self._file, size)

    def keep(self, size: int, held: IO[bytes]) -> int:
        assert held is self._file  # nothing is copied
        self._pass(size)
        start = self._file.tell()
        self._file.seek(size, os.SEEK_CUR)
        return start

    def end(self) -> None:
        pass

    def _pass(self, size: int) -> None:
        if size > self._left:
            raise DamagedError(f"{size:,} bytes are announced where only {self._left:,} are left")
        self._left -= size


class Inflated:
    """A deflated element, inflated no further than it is read.

    Args:
        file: at the first byte that is deflated.
        size: bytes of the file to inflate.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size
        self._inflate = zlib.decompressobj()
        self._waiting = b""

    def take(self, size: int) -> bytes:
        return b"".join(self._pieces(size))

    def keep(self, size: int, held: IO[bytes]) -> int:
        start = held.seek(0, os.SEEK_END)
        for piece in self._pieces(size):
            write_all(held, piece)
        return start

    def end(self) -> None:
        while self._some(_PIECE):
            pass

    def _pieces(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self._some(min(size, _PIECE))
            if not piece:
                raise DamagedError(f"{size:,} bytes are missing at the end of deflated data")
            size -= len(piece)
            yield piece

    def _some(self, most: int) -> bytes:
        """The next bytes, up to `most`; none at the end, where zlib has compared its checksum."""
        while not self._inflate.eof:
            try:
                piece = self._inflate.decompress(self._waiting, most)
            except zlib.error as error:
                raise DamagedError(f"it can't be inflated ({error})") from error
            self._waiting = self._inflate.unconsumed_tail
            if piece:
                return piece
            if not self._waiting and not self._inflate.eof:
                if not self._left:
                    raise DamagedError("deflated data has no end")
                self._waiting = exactly(self._file, min(self._left, _PIECE))
                self._left -= len(self._waiting)
        return b""


def tag(stream: Stream, order: str) -> Tag:
    """The next tag; `order` is the file's byte order, < or >."""
    raw = stream.take(8)
    kind, size = struct.unpack(f"{order}II", raw)
    if not kind >> 16:
        return Tag(kind, size, None)
    kind, size = kind & 0xFFFF, kind >> 16
    if size > 4:
        raise DamagedError(f"{size:,} bytes are announced inside a tag, which holds 4")
    return Tag(kind, size, raw[4 : 4 + size])


def small(stream: Stream, order: str, expected: Collection[int], most: int) -> bytes:
    """Data of the next element, one of the `expected` types and of at most `most` bytes."""
    kind, size, inside = tag(stream, order)
    if kind not in expected or size > most:
        raise DamagedError(
            f"there is an element of type {kind} and {size:,} bytes where one of type "
            f"{' or '.join(map(str, expected))} and at most {most} bytes should be"
        )
    return stream.take(size + -size % 8)[:size] if inside is None else inside


def exactly(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes of a file (DamagedError)."""
    data = file.read(size)
    if len(data) != size:
        raise DamagedError(f"it ends {size - len(data):,} bytes early")
    return data
