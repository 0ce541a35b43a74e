"""MAT v5 files: which variables they hold, and the rows of one, piece by piece.

A reader of our own, since SciPy 1.17's ends the interpreter where a single byte is wrong (see
`test_mat5.py`) and holds a variable in memory whole. It reads full matrices of numbers, deflated
or not, of either byte order; a length is compared with what is left, and a size with the shape,
before either is used.

Source of the format: MathWorks, "MAT-File Format", chapter 1, "Level 5 MAT-File Format". A file is
a header of 128 bytes, then one variable after the other. A variable is an element of elements (see
`elements`): flags, dimensions, name, real parts, imaginary parts; the last two column by column.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.elements import DamagedError, Inflated, Plain, Stream, exactly, small, tag
from csipipe.channels.layout import Unfit

MARKS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
"""Version and byte order, the last four bytes of the header, with struct's name for the order."""
VERSION_4 = tuple(kind.to_bytes(4, "little") for kind in range(0, 53, 10)) + tuple(
    kind.to_bytes(4, "big") for kind in range(1000, 1053, 10)
)
"""How MAT v4 files begin: byte order and class of numbers, for full matrices."""
_HEADER = 128
_INT8, _UINT8, _INT32, _UINT32, _MATRIX, _DEFLATED, _UTF8 = 1, 2, 5, 6, 14, 15, 16
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_NUMBERS |= {12: "i8", 13: "u8"}
"""NumPy's names of numbers, by the type of their element."""
_CLASSES = (
    *("cell", "struct", "object", "char", "sparse", "double", "single"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("function", "opaque"),
)
"""MATLAB's classes; the first has number 1."""
_FULL = {"double": "f8", "single": "f4"} | {name: name for name in _CLASSES[7:15]}
"""NumPy's names of the classes whose values can be read."""
_COMPLEX = 0x800
_AXES, _NAME = 32, 4096
"""Most axes of a variable, and most bytes of its name."""


@dataclass(frozen=True)
class Place:
    """Where a variable's element is: its first byte after the tag, and the number of bytes."""

    start: int
    size: int
    deflated: bool
    order: str
    """Byte order, < or >."""


@dataclass(frozen=True)
class Variable:
    """A variable as its first bytes describe it; its values haven't been read."""

    name: str
    kind: str
    """MATLAB's class."""
    shape: tuple[int, ...]
    is_complex: bool
    place: Place


def variables(path: Path) -> list[Variable]:
    """The named variables of a file, in order.

    Raises:
        DamagedError: the file ends early, or contradicts itself.
        OSError: it can't be opened.
    """
    found = []
    with path.open("rb") as file:
        order = MARKS.get(exactly(file, _HEADER)[124:])
        if order is None:
            raise DamagedError("it is not a MAT file of version 5")
        start, end = _HEADER, os.fstat(file.fileno()).st_size
        while start < end:
            file.seek(start)
            kind, size = struct.unpack(f"{order}II", exactly(file, 8))
            start += 8
            if size > end - start:
                raise DamagedError(
                    f"a variable of {size:,} bytes begins where only {end - start:,} are left"
                )
            if kind not in (_MATRIX, _DEFLATED):
                raise DamagedError(f"there is an element of type {kind} where a variable should be")
            place = Place(start, size, kind == _DEFLATED, order)
            variable = _described(_stream(file, place), place)
            if variable.name:  # MATLAB's own notes have none
                found.append(variable)
            start += size
    return found


class NoRoomError(OSError):
    """There is no room to inflate a variable."""


@contextmanager
def opened(path: Path, variable: Variable, scratch: Path | None = None) -> Iterator[Rows]:
    """The rows of a variable that `variables` found.

    A deflated one is inflated into an unnamed file, in `scratch` or in the system's folder for
    temporary files: its rows are spread over all of it.

    Raises:
        Unfit: a class that isn't a full matrix of numbers.
        DamagedError: the file ends early, or contradicts itself.
        NoRoomError: `scratch` is full, or can't be written to.
    """
    if variable.kind not in _FULL:
        raise Unfit(
            f"{path}: {variable.name} is of class {variable.kind}, a cell array, a struct or text; "
            f"expected a plain matrix of numbers. Save it as one, of class single."
        )
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        stream = _stream(file, variable.place)
        if _described(stream, variable.place) != variable:
            raise DamagedError("it changed while it was read")
        held = file
        try:
            if variable.place.deflated:
                held = stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=0))
            parts = [_part(stream, variable, held) for _ in range(1 + variable.is_complex)]
            stream.end()
        except OSError as error:
            folder = scratch or tempfile.gettempdir()
            raise NoRoomError(
                error.errno, f"{error.strerror} (unpacking {path} in {folder})"
            ) from error
        yield Rows(held.fileno(), variable, parts)


class Rows:
    """Rows of an open variable.

    Args:
        file: descriptor of the file that holds its values, inflated.
        parts: where the real parts, and the imaginary ones if there are any, begin in the file,
            and the type of the numbers.
    """

    def __init__(
        self, file: int, variable: Variable, parts: list[tuple[int, np.dtype[Any]]]
    ) -> None:
        self._file = file
        self._shape = variable.shape
        self._parts = parts
        plain = np.dtype(_FULL[variable.kind])
        self._dtype = np.result_type(plain, np.complex64) if variable.is_complex else plain

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """(stop-start, …) rows, in C order.

        Raises:
            DamagedError: the file has become shorter.
        """
        values = np.empty((stop - start, *self._shape[1:]), self._dtype)
        if len(self._parts) == 1:
            values[...] = self._read(*self._parts[0], start, stop)
        else:
            values.real = self._read(*self._parts[0], start, stop)
            values.imag = self._read(*self._parts[1], start, stop)
        return values

    def mapped(self) -> list[NDArray[Any]]:
        """The whole variable, mapped into memory: real parts, and imaginary ones if there are any.

        Raises:
            DamagedError: the file has become shorter.
        """
        memory = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        count = math.prod(self._shape)
        found = []
        for start, dtype in self._parts:
            if start + count * dtype.itemsize > len(memory):
                raise DamagedError("it became shorter while it was being read")
            values = np.frombuffer(memory, dtype, count, start)
            found.append(values.reshape(self._shape, order="F"))
        return found

    def _read(self, first: int, dtype: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
        """One part of some rows: their piece of each column."""
        rows, *inner = self._shape
        columns = np.empty((math.prod(inner), stop - start), dtype)
        if columns.size:
            for number, column in enumerate(columns):
                place = first + (number * rows + start) * dtype.itemsize
                if os.preadv(self._file, [column.view(np.uint8).data], place) != column.nbytes:
                    raise DamagedError("it became shorter while it was being read")
        return columns.reshape(*reversed(inner), stop - start).T


def _stream(file: IO[bytes], place: Place) -> Stream:
    """The inside of a variable's element."""
    file.seek(place.start)
    if not place.deflated:
        return Plain(file, place.size)
    stream = Inflated(file, place.size)
    kind = tag(stream, place.order).kind
    if kind != _MATRIX:
        raise DamagedError(f"an element of type {kind} was deflated where a variable should be")
    return stream


def _described(stream: Stream, place: Place) -> Variable:
    """Flags, dimensions and name, with which a variable begins."""
    order = place.order
    flags = struct.unpack(f"{order}I", small(stream, order, [_UINT32], 8)[:4].ljust(4, b"\0"))[0]
    number = flags & 0xFF
    if not 1 <= number <= len(_CLASSES):
        raise DamagedError(f"a variable is of class {number}, which doesn't exist")
    kind = _CLASSES[number - 1]
    if kind == "opaque":  # has neither dimensions nor a name where others have them
        return Variable("", kind, (), False, place)
    sizes = small(stream, order, [_INT32], 4 * _AXES)
    shape = tuple(np.frombuffer(sizes[: len(sizes) // 4 * 4], f"{order}i4").tolist())
    if len(shape) < 2 or min(shape) < 0:
        raise DamagedError(f"a variable has the dimensions {shape}")
    name = small(stream, order, [_INT8, _UINT8, _UTF8], _NAME).decode("utf-8", "replace")
    return Variable(name, kind, shape, bool(flags & _COMPLEX), place)


def _part(stream: Stream, variable: Variable, held: IO[bytes]) -> tuple[int, np.dtype[Any]]:
    """Real or imaginary parts: their position in `held`, and the type of the numbers."""
    name, shape, order = variable.name, variable.shape, variable.place.order
    kind, size, inside = tag(stream, order)
    if kind not in _NUMBERS:
        raise DamagedError(f"there is an element of type {kind} where numbers should be")
    dtype = np.dtype(order + _NUMBERS[kind])
    if size != math.prod(shape) * dtype.itemsize:
        raise DamagedError(f"{name} of shape {shape} comes with {size:,} bytes of {dtype.name}")
    if inside is not None:
        raise DamagedError(f"{name} of shape {shape} holds no rows")
    start = stream.keep(size, held)
    if variable.is_complex and size % 8:
        stream.take(-size % 8)
    return start, dtype
