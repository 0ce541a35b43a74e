"""What is wrong with a file of channels, in words, and how to repair it.

An unusable file can't be trained on as it is; a suspicious one can, but is probably not what it
should be. Each check continues with what the previous ones could make of the file, so that two
faults are both named. The thresholds are far from both sides: COST 2100's and generated channels,
indoor and outdoor, lie on one side of each, damaged ones on the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.layout import ANGLES, DELAYS, HT, ROUNDING, transpose
from csipipe.channels.rawfile import read_variable
from csipipe.channels.source import Images
from csipipe.channels.statistics import MOST_ROWS, Reals, spaced
from csipipe.channels.transform import RADIUS, ZERO, to_unit
from csipipe.settings.config import Verdict

_GRID = f"{ANGLES} angles x {DELAYS} delays"
_RESCALE = f"divide each row by twice its peak magnitude (the largest |re + j im|) and add {ZERO}"
_FAINT = 0.01
"""Of the largest peak: 40 dB."""
FEW = 64
"""With fewer rows, mean profiles say too little about the layout."""


@dataclass(frozen=True)
class Finding:
    """One thing that isn't as it should be, and its repair."""

    verdict: Verdict
    what: str
    repair: str


@dataclass
class Examined:
    """A file, what it holds and what is wrong with it."""

    path: Path
    name: str = ""
    """The variable that was read; empty if none could be."""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    low: float = float("nan")
    """The smallest finite value, of real and imaginary part; `high`: the largest."""
    high: float = float("nan")
    images: Images | None = None
    """Its usable rows, (n, 2, 32, 32) in [0, 1], repaired where that needs no guess; at most
    `statistics.MOST_ROWS`, evenly spaced."""
    hashes: list[bytes] = field(default_factory=list)
    """One per usable row; equal where rows are equal in single precision."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings."""
        found = {finding.verdict for finding in self.findings}
        return "unusable" if "unusable" in found else "suspicious" if found else "good"

    def note(self, verdict: Verdict, what: str, repair: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(verdict, what, repair))


def examine(path: Path) -> Examined:
    """Examine one file of images; what is wrong with it is returned, not raised.

    Raises:
        OSError: the file can't be opened.
    """
    seen = Examined(path)
    try:
        seen.name, values = read_variable(path, HT)
    except ValueError as error:
        seen.note("unusable", str(error), "copy, download or save it again")
        return seen
    seen.shape, seen.dtype = values.shape, values.dtype.name
    if seen.name != HT.key:
        seen.note("unusable", f"its variable is {seen.name}", f"rename it to {HT.key}")
    rows = _rows(seen, values)
    if rows is not None:
        rows = _usable(seen, rows)
    if rows is None or not len(rows):
        return seen
    single = np.complex64 if rows.dtype.kind == "c" else np.float32
    rows = rows.astype(single, copy=False)
    seen.hashes = [blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
    if repeated := len(rows) - len(set(seen.hashes)):
        what = f"{repeated:,} of {len(rows):,} rows are duplicates"
        seen.note("suspicious", what, "remove them: numpy.unique(HT, axis=0)")
    seen.images = _to_images(seen, spaced(rows, MOST_ROWS))
    seen.findings += judge(seen.images)
    return seen


def _rows(seen: Examined, values: NDArray[Any]) -> NDArray[Any] | None:
    """(n, 2048) reals or (n, 1024) complex values; None if it can't be seen as such rows."""
    if values.dtype.kind not in "fciu":
        what = f"{seen.name} is a cell array, a struct or text ({values.dtype.name})"
        seen.note("unusable", what, "save it as a plain matrix of class single")
        return None
    if values.dtype == np.float16:
        seen.note("unusable", f"{seen.name} holds half precision (float16)", "save it as single")
    turned = transpose(HT, values.shape) if values.dtype.kind != "c" else ()
    if turned and turned != (0, 1, 2, 3):
        axes = ", ".join(map(str, turned))
        seen.note(
            "unusable",
            f"the axes of {seen.shape} are in another order than {HT.expected}",
            f"save numpy.transpose({seen.name}, ({axes})), not a reshape, which mixes them up",
        )
        values = values.transpose(turned)
    width = HT.width // 2 if values.dtype.kind == "c" else HT.width
    if values.ndim == 2 and values.shape[0] == width != values.shape[1]:
        seen.note("unusable", "samples are columns", f"save {seen.name}.' instead")
        values = values.T
    if not values.size or values.size != len(values) * width:
        seen.note(
            "unusable",
            f"the shape is {seen.shape}; expected {HT.expected}, a row {_GRID}",
            "if it holds antennas x subcarriers: DFT over antennas, inverse DFT over subcarriers, "
            f"keep the first {DELAYS} delays, then {_RESCALE}",
        )
        return None
    if values.dtype.kind in "iu":
        seen.note("unusable", f"{seen.name} holds {values.dtype.name}", "save it as single")
        values = values.astype(np.float32)
    return values.reshape(len(values), width)


def _usable(seen: Examined, rows: NDArray[Any]) -> NDArray[Any]:
    """The finite rows with energy; notes the others, and the range of values."""
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        what = f"NaN or infinite values in {bad.size:,} of {len(rows):,} rows, first in row "
        what += f"{bad[0]} (counted from 0)"
        seen.note("unusable", what, "remove these rows or generate them again")
        rows = rows[finite]
    if len(rows):
        parts = (rows.real, rows.imag) if rows.dtype.kind == "c" else (rows,)
        seen.low = float(min(part.min() for part in parts))
        seen.high = float(max(part.max() for part in parts))
    empty = (rows == rows[:, :1]).all(axis=1)
    if empty.any():
        what = f"{int(empty.sum()):,} rows hold a single value throughout: channels without energy"
        seen.note("unusable", what, "remove these rows")
        rows = rows[~empty]
    return rows


def _to_images(seen: Examined, rows: NDArray[Any]) -> Images:
    """Rows as images in [0, 1]; notes what must be done to them, or should have been done."""
    half = ANGLES * DELAYS
    if rows.dtype.kind == "c":
        what = f"complex values; expected {half} real parts, then {half} imaginary parts, in [0, 1]"
        seen.note(
            "unusable",
            what,
            f"{_RESCALE} to both parts, then put the imaginary parts after the real ones",
        )
        return to_unit(rows.reshape(-1, ANGLES, DELAYS))

    zero = float(np.median(rows))  # most bins of a sparse image are nearly empty
    if len(rows) >= FEW and (way := _parts_elsewhere(rows - np.float32(zero))):
        shape, order, what = way
        seen.note(
            "suspicious",
            what,
            f"HT.reshape(-1, {', '.join(map(str, shape))}).transpose(0, "
            f"{', '.join(map(str, order))}).reshape(-1, {HT.width})",
        )
        rows = rows.reshape(-1, *shape).transpose(0, *order).reshape(rows.shape)
    channel = rows[:, :half] - np.float32(zero) + 1j * (rows[:, half:] - np.float32(zero))
    peaks = np.abs(channel).max(axis=1)
    span = f"values lie in [{seen.low:.4g}, {seen.high:.4g}]"
    in_range = seen.low >= -ROUNDING and seen.high <= 1 + ROUNDING
    if not in_range and not (abs(zero) < 0.1 and peaks.max() <= 1.01 * RADIUS):
        what = f"{span}; expected [0, 1] with {ZERO} for a zero of the channel"
        seen.note("unusable", what, f"subtract the value for zero ({zero:.3g}), {_RESCALE}")
        return to_unit(channel.reshape(-1, ANGLES, DELAYS))
    if not in_range:
        seen.note("unusable", f"{span} around 0 instead of {ZERO}", f"add {ZERO} to every value")
    elif abs(zero - ZERO) > 0.02:
        what = f"the median, which stands for zero, is {zero:.3g} instead of {ZERO}"
        seen.note("suspicious", what, f"subtract it, {_RESCALE}")
    if np.quantile(peaks, 0.05) < 0.9 * peaks.max():
        what = f"rows have peak magnitudes from {peaks.min():.2g} to {peaks.max():.2g}: scaled by "
        what += "the peak of the whole set instead of each by its own"
        seen.note("suspicious", what, f"subtract {ZERO if in_range else 0}, {_RESCALE}")
    image: Images = rows.reshape(-1, *HT.row)
    if in_range and (seen.low < 0 or seen.high > 1):
        image = np.clip(image, 0, 1)
    return image if in_range else image + np.float32(ZERO)


def _parts_elsewhere(
    centred: NDArray[Any],
) -> tuple[tuple[int, ...], tuple[int, ...], str] | None:
    """Shape, order of axes and words, where real and imaginary parts aren't the halves of a row.

    Where one part of a complex value is large, the other usually is, too: with random phase
    2 E|re im| / E(re^2 + im^2) is 2/pi = 0.64; for parts of different bins it is 0.1 to 0.2.
    """
    size = np.abs(centred)
    whole = np.square(size).sum()

    def likeness(shape: tuple[int, ...], axis: int) -> float:
        one, other = np.moveaxis(size.reshape(-1, *shape), axis + 1, 0)
        return float(2 * (one * other).sum() / whole)

    if likeness((2, ANGLES, DELAYS), 0) >= 0.4:
        return None
    last, between = (ANGLES, DELAYS, 2), (ANGLES, 2, DELAYS)
    neighbours, lines = likeness(last, 2), likeness(between, 1)
    if max(neighbours, lines) <= 0.4:
        return None
    what = "real and imaginary parts alternate instead of filling one half of a row each"

    def even(shape: tuple[int, ...], axis: int) -> float:
        """How alike the peaks of rows are: 1 if each was scaled by its own, and pairs are right."""
        parts = np.moveaxis(size.reshape(-1, *shape), axis + 1, 0)
        peaks = np.square(parts).sum(axis=0).reshape(len(size), -1).max(axis=1)
        return float(np.quantile(peaks, 0.05) / peaks.max())

    as_last, as_between = even(last, 2), even(between, 1)
    if max(as_last, as_between) > 0.9:
        neighbours, lines = as_last, as_between
    if neighbours > lines:
        return last, (3, 1, 2), what
    return between, (2, 1, 3), what.replace("alternate", "alternate line by line")


def suspicions(path: Path, rows: NDArray[np.float32]) -> list[Finding]:
    """What `check` would say of rows that can be trained on, but for duplicates.

    Args:
        path: their file.
        rows: (n, 2048) finite, some of the file's.
    """
    seen = Examined(path, low=float(rows.min()), high=float(rows.max()))
    images = _to_images(seen, rows)
    return seen.findings + judge(images)


def judge_converted(images: Images, linear: bool = True) -> list[Finding]:
    """What is suspicious about rows of a converted folder; arguments as `judge`."""
    return [*judge(images, linear), *_uneven(images)]


def _uneven(images: Images) -> list[Finding]:
    """Whether rows of one scale are so unequal that the weakest of them are hardly there."""
    peaks = np.sqrt(np.square(images - np.float32(ZERO)).sum(axis=1).max(axis=(1, 2)))
    weak = float(np.quantile(peaks, 0.05))
    if weak > _FAINT * peaks.max():
        return []
    what = f"5 % of the rows have peaks below {weak:.2g}, the largest has {peaks.max():.2g}: to a "
    what += "model they are 0.5 throughout, though each counts as much as others in the NMSE"
    return [Finding("suspicious", what, "convert the channels with --scaling sample")]


def judge(images: Images, linear: bool = True) -> list[Finding]:
    """Whether axes are in the wrong order, or aren't angles and delays.

    Args:
        images: (n, 2, A, D) in [0, 1], of any size.
        linear: whether their angles are those of one line of antennas.
    """
    if len(images) < FEW:
        return []
    angles, delays = images.shape[2:]
    power_BAD = np.square(images - np.float32(ZERO)).sum(axis=1)
    share_BAD = power_BAD / power_BAD.sum(axis=(1, 2), keepdims=True)
    over_angle_BA, over_delay_BD = share_BAD.sum(axis=2), share_BAD.sum(axis=1)
    spread = [
        name
        for name, share in (("angles", over_angle_BA), ("delays", over_delay_BD))
        if np.sort(share, axis=1)[:, -max(4, share.shape[1] // 8) :].sum(axis=1).mean() < 0.5
    ]
    if spread:
        what = f"energy is spread over all {' and '.join(spread)}: a second DFT over data that was "
        what += "in angles and delays, or none over antennas and subcarriers"
        repair = "leave the second DFT out or undo it with the inverse (numpy.fft.ifft2 of re + j "
        repair += f"im, or fft2 after an inverse one); then {_RESCALE}"
        return [Finding("suspicious", what, repair)]
    if (
        linear
        and _one_sided(over_angle_BA.mean(axis=0)) > 0.3
        and _one_sided(over_delay_BD.mean(axis=0)) < 0.25
    ):
        what = "the axes look swapped, delays before angles: the first one has a delay profile"
        repair = f"HT.reshape(-1, 2, {delays}, {angles}).transpose(0, 1, 3, 2)"
        repair += f".reshape(-1, {2 * delays * angles})"
        return [Finding("suspicious", what, repair)]
    return []


def _one_sided(profile: Reals) -> float:
    """Share of a profile that has no counterpart in bin -n, modulo its length: 0 … 1.

    A UE is as likely on the left as on the right, so angles have one; delays don't.
    """
    return float(np.abs(profile - np.roll(profile[::-1], 1)).sum() / 2)
