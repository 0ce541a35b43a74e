"""Rows of one variable of a .mat file, MAT v5 or v7.3, with errors that name the remedy.

`mat5` reads v5, h5py (imported when needed) v7.3; neither executes anything in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from csipipe.channels import hdf5, mat5
from csipipe.channels.elements import DamagedError
from csipipe.channels.layout import (
    HT,
    Layout,
    Unfit,
    check_class,
    check_key,
    check_number,
    check_shape,
)

PIECE = 4096
"""Rows handed out at once: 32 MiB of HT."""


def count_rows(path: Path, layout: Layout = HT) -> int:
    """Rows in a file, from its header: the values are neither read nor checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither MAT v5 nor v7.3, no such variable, wrong shape or class.
    """
    shape = _shape_v5(path, layout) if _format(path, layout) == "v5" else _shape_v73(path, layout)
    check_shape(path, layout, shape)
    return int(shape[0])


def read_rows(
    path: Path, layout: Layout = HT, scratch: Path | None = None
) -> Iterator[NDArray[Any]]:
    """All rows of a file in order, piece by piece; only one piece is in memory.

    Args:
        scratch: folder into which a deflated v5 variable is inflated while it is read; None:
            the system's folder for temporary files.

    Yields:
        (B, width) real or complex, of the file's precision; the values are not checked.

    Raises:
        FileNotFoundError, ValueError: as `count_rows`; complex instead of real or vice versa.
        mat5.NoRoomError: `scratch` is full, or can't be written to.
    """
    count = count_rows(path, layout)
    v5 = _format(path, layout) == "v5"
    pieces = _read_v5(path, layout, count, scratch) if v5 else _read_v73(path, layout, count)
    for piece in pieces:
        check_number(path, layout, piece)
        yield piece.reshape(len(piece), layout.width)


def _format(path: Path, layout: Layout) -> Literal["v5", "v7.3"]:
    with path.open("rb") as file:
        head = file.read(128)
    if hdf5.is_hdf5(head):
        return "v7.3"
    if head[124:] in mat5.MARKS:
        return "v5"
    if head[:4] in mat5.VERSION_4:
        raise ValueError(
            f"{path} is not a MAT file of version 5 or 7.3, but of version 4. Save it again: in "
            f"Octave with save -v7 {path.name} {layout.key}, in MATLAB with save('{path.name}', "
            f"'{layout.key}')."
        )
    raise ValueError(
        f"{path} is not a MAT file of version 5 or 7.3: it starts with {head[:16]!r}. Expected "
        "one written by MATLAB's save or scipy.io.savemat; if it was downloaded, check the "
        "download."
    )


def _variable_v5(path: Path, layout: Layout) -> mat5.Variable:
    found = {variable.name: variable for variable in mat5.variables(path)}
    check_key(path, layout, list(found))
    check_class(path, layout, found[layout.key].kind)
    return found[layout.key]


def _shape_v5(path: Path, layout: Layout) -> tuple[int, ...]:
    with _explained(path):
        return _variable_v5(path, layout).shape


def _read_v5(
    path: Path, layout: Layout, count: int, scratch: Path | None
) -> Iterator[NDArray[Any]]:
    with _explained(path), mat5.opened(path, _variable_v5(path, layout), scratch) as stored:
        for start in range(0, count, PIECE):
            yield stored.rows(start, min(start + PIECE, count))


def _shape_v73(path: Path, layout: Layout) -> tuple[int, ...]:
    with _explained(path), hdf5.opened(path, layout) as stored:
        return stored.shape


def _read_v73(path: Path, layout: Layout, count: int) -> Iterator[NDArray[Any]]:
    with _explained(path), hdf5.opened(path, layout) as stored:
        step = stored.step(PIECE)
        for start in range(0, count, step):
            yield stored.rows(start, min(start + step, count))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Name the remedy for a damaged file."""
    try:
        yield
    except (Unfit, mat5.NoRoomError):
        raise
    except DamagedError as error:
        raise _damaged(path, str(error)) from error
    except Exception as error:  # h5py raises whatever the damage leads to
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} can't be read: {what}. It has a MAT header and {path.stat().st_size} bytes; it is "
        "probably truncated. Copy or download it again, or save it with a program that reads it."
    )
