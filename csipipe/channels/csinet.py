"""CsiNet's data set: `DATA_H{train,val,test}{in,out}.mat` in one folder.

Source of the layout: C.-K. Wen, W.-T. Shih, S. Jin, "Deep Learning for Massive MIMO CSI
Feedback", IEEE Wireless Communications Letters 7(5), 2018, and its published files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.matfile import ANGLES, DELAYS, count_rows, read_images
from csipipe.channels.source import Images, Part, Site, check_range
from csipipe.channels.transform import shrink

_SUFFIX: dict[Site, str] = {"indoor": "in", "outdoor": "out"}


class CsiNetSource:
    """Rows of CsiNet's files; training and validation files together are the training rows.

    Training rows come in an order drawn from the seed, so that a range of them is a random
    draw; test rows come in file order. A file is read on the first call that needs its values.

    Args:
        folder: where the files are.
        seed: names the order of the training rows.
        angles: 1 … 32; below 32 the images are shrunk to that many antennas.
        delays: 1 … 32; below 32 the first ones are kept.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: more angles or delays than the files hold.
    """

    def __init__(self, folder: Path, seed: int, angles: int, delays: int) -> None:
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
        self._angles = angles
        self._delays = delays
        self._counts: dict[tuple[Site, Part], int] = {}
        self._images: dict[tuple[Site, Part], Images] = {}

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
            ValueError: a file is damaged or holds something else (see `matfile`), or the range
                goes beyond what is available.
        """
        check_range(start, stop, self.available(environment, part))
        chosen = self._order(environment, part)[start:stop]
        images = self._read(environment, part)[chosen]
        if (self._angles, self._delays) == (ANGLES, DELAYS):
            return images
        return shrink(images, self._angles, self._delays)

    def _files(self, environment: Site, part: Part) -> list[Path]:
        """The first must exist; the validation file is optional."""
        suffix = _SUFFIX[environment]
        needed = self._folder / f"DATA_H{part}{suffix}.mat"
        if not needed.is_file():
            found = sorted(path.name for path in self._folder.glob("*.mat"))
            raise FileNotFoundError(
                f"{needed} does not exist; the folder's .mat files are {found or 'none'}. "
                f"Add it, or set data.path or data.environment so that it isn't needed."
            )
        validation = self._folder / f"DATA_Hval{suffix}.mat"
        return [needed, validation] if part == "train" and validation.is_file() else [needed]

    def _order(self, environment: Site, part: Part) -> NDArray[np.int64]:
        count = self.available(environment, part)
        if part == "test":
            return np.arange(count)
        stream = np.random.SeedSequence((self._seed, list(_SUFFIX).index(environment)))
        return np.random.default_rng(stream).permutation(count)

    def _read(self, environment: Site, part: Part) -> Images:
        key = (environment, part)
        if key not in self._images:
            files = [read_images(path) for path in self._files(environment, part)]
            self._images[key] = files[0] if len(files) == 1 else np.concatenate(files)
        return self._images[key]
