"""MAT v7.3 files, which are HDF5: header and rows of one variable.

MATLAB stores a matrix with its axes reversed: n x 2048 is (2048, n) on disk. Other programs write
it as it is; which of the two applies is recognised by the size of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.elements import DamagedError
from csipipe.channels.layout import Layout, Unfit, check_class, check_key

_MARK = b"\x89HDF\r\n\x1a\n"
_V73 = (b"\x00\x02IM", b"\x02\x00MI")
"""Bytes 124 … 127 of a MAT v7.3 file, as `mat5.MARKS`."""
_MOST_DEFLATED = 1100
"""A byte of deflated data holds at most 1032."""
_MOST_ROWS = 1 << 17
"""Most rows read at once, 1 GiB of HT: a data set of CsiNet as one chunk."""


def library(path: Path) -> Any:
    """h5py, imported only where a file needs it: training on other data goes without.

    Raises:
        Unfit: it can't be imported.
    """
    try:
        import h5py
    except ImportError as error:
        raise Unfit(
            f"{path} is HDF5 (as MAT v7.3 is), which h5py reads, and it can't be imported "
            f"({error}). Install it with: pip install h5py; or save the file in another format, a "
            "MAT file with -v7."
        ) from error
    return h5py


def is_hdf5(head: bytes) -> bool:
    """Whether a file whose first 128 bytes these are is HDF5, with MATLAB's header or without."""
    return head.startswith(_MARK) or head[124:] in _V73


@dataclass(frozen=True)
class Stored:
    """An open dataset."""

    dataset: Any
    shape: tuple[int, ...]
    """As MATLAB shows it, rows first."""
    turned: bool
    """Whether the axes on disk are reversed."""

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """(stop-start, …) rows, rows first."""
        block = self.dataset[..., start:stop] if self.turned else self.dataset[start:stop]
        if block.dtype.names:  # MATLAB's complex numbers
            block = block["real"] + 1j * block["imag"]
        return np.asarray(block.T if self.turned else block)

    def step(self, least: int) -> int:
        """Rows to read at once, `least` or more: whole chunks, so that none is unpacked twice."""
        if self.dataset.chunks is None:
            return least
        chunk = int(self.dataset.chunks[-1 if self.turned else 0])
        whole = -(-least // chunk) * chunk
        # a size stated in a file must not decide what is allocated
        return whole if whole <= _MOST_ROWS else least


@contextmanager
def opened(path: Path, layout: Layout) -> Iterator[Stored]:
    """The variable of a file, its rows not read yet.

    Raises:
        ValueError: no such variable, or not one of floating point numbers.
        DamagedError: a shape that its data can't have.
        Exception: not HDF5, or damaged (h5py's errors, of several types).
    """
    h5py = library(path)
    with h5py.File(path, "r", locking=False) as file:
        check_key(path, layout, [name for name in file if not name.startswith("#")])
        # a link would read another file than the one that messages name
        stored = file[layout.key] if is_own(h5py, file, layout.key) else None
        if isinstance(stored, h5py.Group) and is_octaves(stored):
            raise Unfit(
                f"{path}: {layout.key} was saved by Octave's save -hdf5, as a group. Save it again "
                f"in Octave with save -v7 {path.name} {layout.key}."
            )
        if not isinstance(stored, h5py.Dataset):
            check_class(path, layout, "group (a struct, a sparse matrix or a link)")
        check_class(path, layout, _class(stored))
        check_storage(stored)
        yield _oriented(stored, layout)


def is_own(h5py: Any, file: Any, key: str) -> bool:
    """Whether a variable is in the file itself, and isn't a link or made of other files."""
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        return False
    stored = file[key]
    return not isinstance(stored, h5py.Dataset) or _is_inside(stored)


def _is_inside(array: Any) -> bool:
    """Whether the values of a dataset are in its file, not in others."""
    return not (array.external or array.is_virtual)


def own_arrays(h5py: Any, file: Any) -> list[str]:
    """The datasets that are in a file itself, in any group of it: `group/name`."""
    found: list[str] = []

    def note(name: str, stored: Any) -> None:  # never called for a link to another file
        if isinstance(stored, h5py.Dataset) and _is_inside(stored) and not name.startswith("#"):
            found.append(name)  # what begins so is MATLAB's own

    file.visititems(note)
    return found


def is_octaves(group: Any) -> bool:
    """Whether a group is a variable as Octave's `save -hdf5` writes it."""
    return {"type", "value"} <= set(group)


def check_storage(stored: Any) -> None:
    """Refuse a shape that the stored bytes can't fill: excess rows would be read as zeros."""
    held = stored.id.get_storage_size()
    if stored.nbytes > (held if stored.compression is None else _MOST_DEFLATED * held):
        raise DamagedError(
            f"shape {stored.shape} needs more than the {held:,} bytes that are stored"
        )


def _class(stored: Any) -> str:
    """MATLAB's class of a dataset; an empty one, which stores its shape, keeps its class."""
    said = stored.attrs.get("MATLAB_class", b"")
    said = said.decode() if isinstance(said, bytes) else str(said)
    if "MATLAB_empty" in stored.attrs:
        return said
    dtype = stored.dtype
    if dtype.names == ("real", "imag"):
        dtype = dtype["real"]
    names = {np.dtype("f4"): "single", np.dtype("f8"): "double"}
    return names.get(dtype.newbyteorder("="), said or str(dtype))


def _oriented(stored: Any, layout: Layout) -> Stored:
    if "MATLAB_empty" in stored.attrs:
        return Stored(stored, tuple(int(size) for size in stored[...].ravel()), False)
    straight = Stored(stored, tuple(stored.shape), False)
    turned = Stored(stored, tuple(stored.shape[::-1]), True)
    ways = [turned, straight] if "MATLAB_class" in stored.attrs else [straight, turned]
    fitting = [way for way in ways if math.prod(way.shape[1:]) == layout.width]
    return (fitting or ways)[0]
