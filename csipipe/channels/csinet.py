"""CsiNet's data set: `DATA_H{train,val,test}{in,out}.mat` in one folder.

Source of the layout: C.-K. Wen, W.-T. Shih, S. Jin, "Deep Learning for Massive MIMO CSI
Feedback", IEEE Wireless Communications Letters 7(5), 2018, and its published files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.cache import Copy, converted
from csipipe.channels.layout import ANGLES, DELAYS, GRID, HF, HT, check_finite
from csipipe.channels.matfile import count_rows, read_rows
from csipipe.channels.source import SITES, Images, Kind, Part, Responses, Site, check_range
from csipipe.channels.transform import shrink
from csipipe.settings.config import DataSettings, Verdict

SUFFIX: dict[Site, str] = {"indoor": "in", "outdoor": "out"}
"""How file names end: DATA_Htrainin.mat, DATA_Htrainout.mat."""
NO_FILE = "no DATA_HtestF…_all.mat"
SMALLER = f"HF_all has {ANGLES} angles"
_PIECE = 1024
"""Rows copied at once from a mapped file."""


class CsiNetSource:
    """Rows of CsiNet's files; training and validation files together are the training rows.

    Training rows come in an order drawn from the seed, so that a range of them is a random
    sample; test rows come in file order. The first call that needs a file's values converts it (see
    `cache`); only the requested rows take memory of this process.

    Args:
        folder: where the files are.
        seed: of the order of the training rows.
        angles: 1 … 32; below 32 the images are shrunk to that many antennas. None: 32.
        delays: 1 … 32; below 32 the first ones are kept. None: 32.
        accept: the worst verdict of the doctor that isn't refused.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: more angles or delays than the files hold.
    """

    padded = GRID
    """Of which `HF_all` has the first 125."""
    environments = SITES
    """Whether there are files or not."""
    kind: Kind = "channel"

    def __init__(
        self,
        folder: Path,
        seed: int,
        angles: int | None = None,
        delays: int | None = None,
        accept: Verdict = "suspicious",
    ) -> None:
        angles, delays = angles or ANGLES, delays or DELAYS
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data.path is {folder}, which is not a folder; expected the one that holds "
                "DATA_Htrainin.mat and its siblings."
            )
        for name, asked, held in (("angles", angles, ANGLES), ("delays", delays, DELAYS)):
            if not 1 <= asked <= held:
                raise ValueError(
                    f"model.{name} is {asked}; CsiNet's files hold {held}. Set it to 1 … {held}."
                )
        self._folder = folder
        self._seed = seed
        self.size = angles, delays
        self.array = angles, 1, 1  # a line of antennas
        self._accept = accept
        self._counts: dict[tuple[Site, Part], int] = {}
        self._copies: dict[tuple[Site, Part], list[Copy]] = {}

    def available(self, environment: Site, part: Part) -> int:
        """Rows in the files of an environment and part, from their headers."""
        key = (environment, part)
        if key not in self._counts:
            self._counts[key] = sum(map(count_rows, self._files(environment, part)))
        return self._counts[key]

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        """Rows start … stop-1: (stop-start, 2, A, D) float32 in [0, 1].

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, holds something else (see `matfile`, `layout`) or isn't
                accepted, or the range goes beyond what is available.
            OSError: there is no room for the converted copy (see `cache`).
        """
        check_range(start, stop, self.available(environment, part))
        copies = self._converted(environment, part)
        if part == "test":  # in file order: the mapped copy itself, which all ranks share
            images = copies[0].open()[start:stop].reshape(-1, 2, ANGLES, DELAYS)
        else:
            images = _gather(copies, self._order(environment, part)[start:stop])
        if self.size == (ANGLES, DELAYS):
            return images
        return shrink(images, *self.size)

    def identity(self, environment: Site, part: Part) -> dict[str, Any]:
        """The files by name, rows and SHA-256, and how the order of the rows is drawn."""
        order = self._order(environment, part).astype("<i8")
        return {
            "files": [
                {"name": Path(copy.path).name, "rows": copy.rows, "sha256": copy.sha256}
                for copy in self._converted(environment, part)
            ],
            "order": (
                "as in the files"
                if part == "test"
                else f"numpy.random.default_rng(numpy.random.SeedSequence(({self._seed}, "
                f"{list(SUFFIX).index(environment)}))).permutation({len(order)})"
            ),
            "order_sha256": hashlib.sha256(order.tobytes()).hexdigest(),
        }

    def user_borders(self, environment: Site, part: Part) -> None:
        """None: each row is a user's only one."""

    def frequency_rows(
        self, environment: Site, part: Part, start: int, stop: int
    ) -> Responses | str:
        """`HF_all` of test rows, in file order; there is none of training rows.

        Raises:
            ValueError: the file is damaged (see `frequency_channels`), or has another number of
                rows than the test set.
        """
        check_range(start, stop, self.available(environment, part))
        if self.size[0] != ANGLES:
            return SMALLER
        found = frequency_channels(self._folder, environment) if part == "test" else None
        if found is None:
            return NO_FILE
        there = self.available(environment, part)
        if len(found) != there:
            raise ValueError(
                f"{self._folder}: HF_all has {len(found)} {environment} rows, the test set "
                f"{there}; it must hold the same samples. Move the file away to evaluate without ρ."
            )
        return found[start:stop]

    def _files(self, environment: Site, part: Part) -> list[Path]:
        """The first must exist; the validation file is optional."""
        suffix = SUFFIX[environment]
        needed = self._folder / f"DATA_H{part}{suffix}.mat"
        if not needed.is_file():
            found = sorted(path.name for path in self._folder.glob("*.mat"))
            raise FileNotFoundError(
                f"{needed} does not exist; the folder's .mat files are {found or 'none'}. "
                f"Add it, or set data.path or data.environment so that it isn't needed."
            )
        validation = self._folder / f"DATA_Hval{suffix}.mat"
        return [needed, validation] if part == "train" and validation.is_file() else [needed]

    def _converted(self, environment: Site, part: Part) -> list[Copy]:
        key = (environment, part)
        if key not in self._copies:
            copies = [converted(path, self._accept) for path in self._files(environment, part)]
            found, counted = sum(copy.rows for copy in copies), self.available(environment, part)
            if found != counted:
                raise ValueError(
                    f"{self._folder}: the {environment} {part} files had {counted} rows and now "
                    f"have {found}; start again when they are complete."
                )
            self._copies[key] = copies
        return self._copies[key]

    def _order(self, environment: Site, part: Part) -> NDArray[np.int64]:
        count = self.available(environment, part)
        if part == "test":
            return np.arange(count)
        stream = np.random.SeedSequence((self._seed, list(SUFFIX).index(environment)))
        return np.random.default_rng(stream).permutation(count)


def open_source(data: DataSettings, angles: int | None, delays: int | None) -> CsiNetSource:
    """As `csipipe.channels.open_source`."""
    assert data.path is not None  # checked by DataSettings
    return CsiNetSource(Path(data.path), data.seed, angles, delays, data.accept)


def frequency_channels(folder: Path, environment: Site) -> NDArray[np.complex64] | None:
    """`HF_all` of an environment's test rows, in file order; None if the folder has none.

    CsiNet calls these spatial-frequency channels, but compares them with reconstructions whose
    angles it doesn't transform back: the first axis is the images' (see
    `images.frequencies_of_rays`).

    Returns:
        (rows, 32, 125) complex64: angles, the first 125 of 257 frequencies; of any scale.

    Raises:
        ValueError: the file is damaged, or holds something else (see `matfile`, `layout`).
    """
    path = folder / f"DATA_HtestF{SUFFIX[environment]}_all.mat"
    if not path.is_file():
        return None
    channels = np.empty((count_rows(path, HF), HF.width), np.complex64)
    first = 0
    for values in read_rows(path, HF):
        check_finite(path, HF, values, first)
        channels[first : first + len(values)] = values
        first += len(values)
    return channels.reshape(-1, *HF.row)


def _gather(copies: list[Copy], chosen: NDArray[np.int64]) -> Images:
    """Rows by their numbers in the joined files: (len(chosen), 2, 32, 32)."""
    images = np.empty((len(chosen), HT.width), np.float32)
    first = 0
    for copy in copies:
        mine = np.flatnonzero((first <= chosen) & (chosen < first + copy.rows))
        mine = mine[np.argsort(chosen[mine])]  # disks read forward
        for begin in range(0, len(mine), _PIECE):
            piece = mine[begin : begin + _PIECE]
            # mapped only briefly, so that touched pages don't add up in this process
            images[piece] = copy.open()[chosen[piece] - first]
        first += copy.rows
    return images.reshape(-1, *HT.row)
