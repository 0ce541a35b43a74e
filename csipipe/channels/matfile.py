"""Rows of one variable of a .mat file, MAT v5 or v7.3, with errors that name the remedy.

SciPy reads v5, h5py v7.3; neither executes anything in a file. Both are imported when needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.hdf5 import opened
from csipipe.channels.layout import (
    HT,
    Layout,
    Unfit,
    check_class,
    check_key,
    check_number,
    check_shape,
)

_ROWS = 4096
"""Rows handed out at once: 32 MiB of HT."""
_V5 = (b"\x00\x01IM", b"\x01\x00MI")
"""Version and byte order, bytes 124 … 127 of the header: little-endian, big-endian."""
_V73 = (b"\x00\x02IM", b"\x02\x00MI")
_HDF5 = b"\x89HDF\r\n\x1a\n"


def count_rows(path: Path, layout: Layout = HT) -> int:
    """Rows in a file, from its header: the values are neither read nor checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither MAT v5 nor v7.3, no such variable, wrong shape or class.
    """
    shape = _shape_v5(path, layout) if _format(path, layout) == "v5" else _shape_v73(path, layout)
    check_shape(path, layout, shape)
    return int(shape[0])


def read_rows(path: Path, layout: Layout = HT) -> Iterator[NDArray[Any]]:
    """All rows of a file, in pieces, in order.

    A v5 variable is in memory whole while it is read, a v7.3 one only a piece at a time.

    Yields:
        (B, width) real or complex, of the file's precision; the values are not checked.

    Raises:
        FileNotFoundError, ValueError: as `count_rows`; complex instead of real or vice versa.
    """
    count = count_rows(path, layout)
    read = _read_v5 if _format(path, layout) == "v5" else _read_v73
    for piece in read(path, layout, count):
        check_number(path, layout, piece)
        yield piece.reshape(len(piece), layout.width)


def _format(path: Path, layout: Layout) -> Literal["v5", "v7.3"]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a .mat file with {layout.expected}."
        )
    with path.open("rb") as file:
        head = file.read(128)
    if head[124:] in _V73 or head.startswith(_HDF5):
        return "v7.3"
    if head[124:] in _V5:
        return "v5"
    raise ValueError(
        f"{path} is not a MAT file of version 5 or 7.3: it starts with {head[:16]!r}. Expected "
        "one written by MATLAB's save or scipy.io.savemat; if it was downloaded, see whether "
        "the download is what it should be."
    )


def _shape_v5(path: Path, layout: Layout) -> tuple[int, ...]:
    from scipy import io

    try:
        variables = io.whosmat(path)
    except Exception as error:  # SciPy's reader raises whatever the damage leads to
        raise _damaged(path, error) from error
    found = {name: (shape, kind) for name, shape, kind in variables}
    check_key(path, layout, list(found))
    shape, kind = found[layout.key]
    check_class(path, layout, kind)
    return tuple(shape)


def _read_v5(path: Path, layout: Layout, count: int) -> Iterator[NDArray[Any]]:
    from scipy import io

    try:
        values = io.loadmat(path, variable_names=[layout.key])[layout.key]
    except Exception as error:
        raise _damaged(path, error) from error
    for start in range(0, count, _ROWS):
        # SciPy's are in MATLAB's order, columns first
        yield np.ascontiguousarray(values[start : start + _ROWS])


def _shape_v73(path: Path, layout: Layout) -> tuple[int, ...]:
    try:
        with opened(path, layout) as stored:
            return stored.shape
    except Unfit:
        raise
    except Exception as error:  # as SciPy's
        raise _damaged(path, error) from error


def _read_v73(path: Path, layout: Layout, count: int) -> Iterator[NDArray[Any]]:
    try:
        with opened(path, layout) as stored:
            step = stored.step(_ROWS)
            for start in range(0, count, step):
                yield stored.rows(start, min(start + step, count))
    except Unfit:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} can't be read: {type(error).__name__}: {error}. It has a MAT header and "
        f"{path.stat().st_size} bytes; it is probably truncated. Copy or download it again."
    )
