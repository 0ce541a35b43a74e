"""What CsiNet's variables must look like, and the errors if they don't."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ANGLES = DELAYS = 32
GRID = 257
"""Points of the frequency grid over the band."""
FREQUENCIES = 125
"""Frequency bins of `HF_all`, the first ones of the grid."""


ROUNDING = 1e-6
"""How far outside [0, 1] rounding may put a value of a scaled image; it is clipped."""


class Unfit(ValueError):
    """A readable file holds something else; other errors mean that it is damaged."""


@dataclass(frozen=True)
class Layout:
    """A variable with one sample per row."""

    key: str
    row: tuple[int, ...]
    """A row's axes; in the file they may be flattened, in C order."""
    meaning: str
    kind: str
    """NumPy's letter of the values: f for real, c for complex."""

    @property
    def width(self) -> int:
        """Values per row."""
        return math.prod(self.row)

    @property
    def expected(self) -> str:
        """The variable in words."""
        axes = ", ".join(map(str, self.row))
        number = "real" if self.kind == "f" else "complex"
        return f"{number} {self.key} of shape (rows, {self.width}) or (rows, {axes})"


HT = Layout("HT", (2, ANGLES, DELAYS), f"2 x {ANGLES} angles x {DELAYS} delays", "f")
"""Images in [0, 1]: real and imaginary part, angles, delays."""
HF = Layout("HF_all", (ANGLES, FREQUENCIES), f"{ANGLES} angles x {FREQUENCIES} frequencies", "c")
"""Untruncated channels of the test rows, for the cosine similarity."""


def check_key(path: Path, layout: Layout, found: list[str]) -> None:
    """Refuse (`Unfit`) a file without the variable."""
    if layout.key not in found:
        raise Unfit(
            f"{path} has no variable {layout.key}; found {sorted(found) or 'none'}. "
            f"Expected {layout.expected}; rename the variable and save the file again."
        )


def check_class(path: Path, layout: Layout, found: str) -> None:
    """Refuse (`Unfit`) whatever isn't MATLAB's class single or double."""
    if found not in ("single", "double"):
        number = "real" if layout.kind == "f" else "complex"
        raise Unfit(
            f"{path}: {layout.key} is of class {found}; expected {number} single or double. "
            f"Convert it, for example with single({layout.key}), and save the file again."
        )


def check_shape(path: Path, layout: Layout, shape: tuple[int, ...]) -> None:
    """Refuse (`Unfit`) a shape that isn't rows of the layout; they come first."""
    if shape[1:] in (layout.row, (layout.width,)) and shape[0] > 0:
        return
    key = layout.key
    remedy = f"Reshape {key} and save the file again."
    if len(shape) == 2 and shape[0] == layout.width:
        remedy = f"It looks transposed: save {key}.' instead."
    elif turned := transpose(layout, shape):
        axes = ", ".join(map(str, turned))
        matlab = " ".join(str(axis + 1) for axis in turned)
        remedy = (
            f"Its axes are in another order, which a plain reshape would mix up: save "
            f"numpy.transpose({key}, ({axes})), in MATLAB permute({key}, [{matlab}]), then run "
            "channels check, since angles and delays can't be told apart by their numbers."
        )
    elif 0 in shape:
        remedy = "The file has no rows; leave it out or fill it."
    elif math.prod(shape[1:]) != layout.width:
        remedy = f"A row must hold {layout.meaning} = {layout.width} values" + (
            "; channels in antennas and subcarriers must be transformed and truncated first."
            if layout is HT
            else "."
        )
    raise Unfit(f"{path}: {key} has shape {tuple(shape)}; expected {layout.expected}. {remedy}")


def transpose(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes that makes (rows, *layout.row) of a shape; empty if none does, or many.

    Of axes of equal size, the order is kept.
    """
    sizes = list(shape)
    found = []
    for size in layout.row:
        if size not in sizes:
            return ()
        place = sizes.index(size)
        found.append(place)
        sizes[place] = -1
    rows = [axis for axis, size in enumerate(sizes) if size > 0]
    return (rows[0], *found) if len(rows) == 1 and len(shape) == len(layout.row) + 1 else ()


def check_number(path: Path, layout: Layout, values: NDArray[Any]) -> None:
    """Refuse (`Unfit`) complex values where reals are expected, and vice versa."""
    if values.dtype.kind != layout.kind:
        wanted = (
            "reals in [0, 1], real and imaginary parts as separate halves of a row"
            if layout.kind == "f"
            else "complex values"
        )
        raise Unfit(f"{path}: {layout.key} holds {values.dtype.name} values; expected {wanted}.")


def check_finite(path: Path, layout: Layout, values: NDArray[Any], first: int) -> None:
    """Refuse (`Unfit`) NaN and infinite values in `values` (B, …), rows `first` … of a file."""
    # a sum is finite unless a value isn't (or values are absurdly large): saves an array of flags
    with np.errstate(invalid="ignore", over="ignore"):
        total = values.sum(dtype=np.complex128 if layout.kind == "c" else np.float64)
    if np.isfinite(total):
        return
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    bad = np.flatnonzero(~finite)
    if bad.size:
        raise Unfit(
            f"{path}: {layout.key} holds NaN or infinite values, first in row {first + bad[0]} "
            f"(counted from 0); expected finite values. Remove such rows or generate them again."
        )


def check_images(path: Path, values: NDArray[Any], first: int, unbounded: bool = False) -> None:
    """Refuse (`Unfit`) what isn't an image in [0, 1] with energy.

    Args:
        path: the file, for messages.
        values: (B, 2048) rows of HT.
        first: number of the first of them in the file.
        unbounded: let values outside of [0, 1] pass.
    """
    check_finite(path, HT, values, first)
    least, most = float(values.min()), float(values.max())
    if not unbounded and (least < -ROUNDING or most > 1 + ROUNDING):
        centred = -0.5 <= least < 0 and most <= 0.5
        hint = (
            f"It looks centred at 0: add 0.5 to {HT.key}."
            if centred
            else "Scale each row by its peak magnitude to radius 0.5 and add 0.5."
        )
        raise Unfit(
            f"{path}: {HT.key} lies in [{least:.9g}, {most:.9g}] in rows {first} … "
            f"{first + len(values) - 1}; expected [0, 1] with 0.5 for zero. {hint} To train on it "
            "all the same, set data.accept to unusable."
        )
    empty = np.flatnonzero((values == values[:, :1]).all(axis=1))
    if empty.size:
        raise Unfit(
            f"{path}: row {first + empty[0]} of {HT.key} (counted from 0) holds a single value "
            "throughout: a channel without energy, for which no NMSE exists. Remove such rows."
        )
