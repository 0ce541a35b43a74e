"""One of CsiNet's .mat files: header and values, checked, with errors that name the remedy.

Only MATLAB's version 5 format is read, through SciPy, which executes nothing in a file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import io as scipy_io

from csipipe.channels.source import Images

KEY = "HT"
ANGLES = DELAYS = 32
REALS = 2 * ANGLES * DELAYS
"""Reals per row: 2048, C-ordered as (real and imaginary part, angles, delays)."""

_EXPECTED = f"{KEY} of shape (rows, {REALS}) or (rows, 2, {ANGLES}, {DELAYS})"
_V5 = (b"\x00\x01IM", b"\x01\x00MI")
"""Version and byte order, bytes 124 … 127 of the header: little-endian, big-endian."""
_V73 = (b"\x00\x02IM", b"\x02\x00MI")
_HDF5 = b"\x89HDF"


def count_rows(path: Path) -> int:
    """Rows in a file, from its header: the values are neither read nor checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a MAT v5 file, no key HT, wrong shape or type.
    """
    _check_format(path)
    try:
        variables = scipy_io.whosmat(path)
    except Exception as error:  # SciPy's reader raises whatever the damage leads to
        raise _damaged(path, error) from error
    found = {name: (shape, kind) for name, shape, kind in variables}
    if KEY not in found:
        raise ValueError(
            f"{path} has no variable {KEY}; found {sorted(found) or 'none'}. "
            f"Expected {_EXPECTED}; rename the variable and save the file again."
        )
    shape, kind = found[KEY]
    if kind not in ("single", "double"):
        raise ValueError(
            f"{path}: {KEY} is of class {kind}; expected real single or double in [0, 1]. "
            f"Convert it, for example with single({KEY}), and save the file again."
        )
    _check_shape(path, shape)
    return int(shape[0])


def read_images(path: Path) -> Images:
    """All rows of a file as images.

    Returns:
        (N, 2, 32, 32) float32 in [0, 1], C-contiguous, in file order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `count_rows`; besides complex, NaN or infinite values, or values
            outside [0, 1].
    """
    count_rows(path)
    try:
        values: NDArray[Any] = scipy_io.loadmat(path, variable_names=[KEY])[KEY]
    except Exception as error:
        raise _damaged(path, error) from error
    if values.dtype.kind != "f":
        raise ValueError(
            f"{path}: {KEY} holds {values.dtype.name} values; expected reals in [0, 1], real and "
            "imaginary parts as separate halves of a row."
        )
    _check_values(path, values)
    return np.ascontiguousarray(values, np.float32).reshape(-1, 2, ANGLES, DELAYS)


def _check_format(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a .mat file with {_EXPECTED}.")
    with path.open("rb") as file:
        head = file.read(128)
    if head[124:] in _V73 or head.startswith(_HDF5):
        raise ValueError(
            f"{path} is a MAT v7.3 file, that is HDF5; expected MAT v5. Save it again in MATLAB "
            f'with save(..., "-v7"), or read it with h5py, transpose {KEY} and write it with '
            "scipy.io.savemat."
        )
    if head[124:] not in _V5:
        raise ValueError(
            f"{path} is not a MAT v5 file: it starts with {head[:16]!r}. Expected one written by "
            'MATLAB\'s save(..., "-v7") or scipy.io.savemat; if it was downloaded, see whether '
            "the download is what it should be."
        )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} can't be read: {type(error).__name__}: {error}. It has a MAT v5 header and "
        f"{path.stat().st_size} bytes; it is probably truncated. Copy or download it again."
    )


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    flat = len(shape) == 2 and shape[1] == REALS
    if (flat or shape[1:] == (2, ANGLES, DELAYS)) and shape[0] > 0:
        return
    remedy = f"Reshape {KEY} and save the file again."
    if len(shape) == 2 and shape[0] == REALS:
        remedy = f"It looks transposed: save {KEY}.' instead."
    elif shape[0] == 0:
        remedy = "The file has no rows; leave it out or fill it."
    elif math.prod(shape[1:]) != REALS:
        remedy = (
            f"A row must hold 2 x {ANGLES} angles x {DELAYS} delays = {REALS} reals; channels in "
            "antennas and subcarriers must be transformed and truncated first."
        )
    raise ValueError(f"{path}: {KEY} has shape {tuple(shape)}; expected {_EXPECTED}. {remedy}")


def _check_values(path: Path, values: NDArray[Any]) -> None:
    least, most = float(values.min()), float(values.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        bad = np.flatnonzero(~finite)
        raise ValueError(
            f"{path}: {KEY} holds NaN or infinite values in {bad.size} row(s), the first of them "
            f"row {bad[0]} (counted from 0); expected finite values in [0, 1]. Remove the rows "
            "or make them again."
        )
    if least < 0 or most > 1:
        centred = -0.5 <= least < 0 and most <= 0.5
        hint = (
            f"It looks centred at 0: add 0.5 to {KEY}."
            if centred
            else "Scale each row by its peak magnitude to radius 0.5 and add 0.5."
        )
        raise ValueError(
            f"{path}: {KEY} lies in [{least:g}, {most:g}]; expected [0, 1] with 0.5 for zero. "
            f"{hint}"
        )
    rows = values.reshape(len(values), -1)
    empty = np.flatnonzero((rows == rows[:, :1]).all(axis=1))
    if empty.size:
        raise ValueError(
            f"{path}: {empty.size} row(s) of {KEY} hold one value throughout, the first of "
            f"them row {empty[0]} (counted from 0): a channel without energy, for which no NMSE "
            "exists. Remove the rows."
        )
