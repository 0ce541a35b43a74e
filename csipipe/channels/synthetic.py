"""Channels made on demand: a stream per seed, environment and part, in blocks of fixed size.

Every block has its own random generator, so row i is the same however many rows are made, and a
UE makes only the blocks that contain its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.eigenvectors import SUBBANDS, images_of, to_image
from csipipe.channels.images import frequencies_of_rays, images_of_rays
from csipipe.channels.layout import ANGLES, DELAYS, FREQUENCIES, GRID
from csipipe.channels.scenario import SCENARIOS, SUBCARRIERS, Rays, draw_rays
from csipipe.channels.source import SITES, Images, Kind, Part, Site, check_range
from csipipe.channels.transform import to_unit
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import KINDS

BLOCK = 128
"""Rows per block. Part of the stream's definition: another size gives other channels."""

VERSION = 1
"""Recorded in manifests: raise it with any change that gives a seed other channels."""

_PARTS: tuple[Part, ...] = ("train", "test")


def generator(seed: int, environment: Site, part: Part, block: int) -> np.random.Generator:
    """The random numbers of one block, independent of those of every other."""
    stream = (seed, SITES.index(environment), _PARTS.index(part), block)
    return np.random.default_rng(np.random.SeedSequence(stream))


class SyntheticSource:
    """Clustered multipath on a half-wavelength array, 1024 subcarriers in 20 MHz.

    Args:
        seed: of the streams; the same seed makes the same rows.
        angles: antennas and angular bins A. None: 32.
        delays: delay bins D kept of the 1024. None: 32. Of eigenvectors: subbands of the 125
            frequencies; None: 13.
        kind: what the images show. Eigenvectors are those of one receive antenna.

    Raises:
        ValueError: more delays than subcarriers, or more subbands than frequencies.
    """

    padded = GRID
    """Of which the first 125 are made."""
    environments = SITES

    def __init__(
        self,
        seed: int,
        angles: int | None = None,
        delays: int | None = None,
        kind: Kind = "channel",
    ) -> None:
        self._vectors = KINDS[kind].similarity
        most = FREQUENCIES if self._vectors else SUBCARRIERS
        angles, delays = angles or ANGLES, delays or (SUBBANDS if self._vectors else DELAYS)
        if delays > most:
            there = "frequencies for subbands" if self._vectors else "delay bins"
            raise ValueError(
                f"model.delays is {delays}; the channel has {most} {there}. Set it to 1 … {most}."
            )
        self._seed = seed
        self.size = angles, delays
        self.kind = kind
        self.array = angles, 1, 1  # a line of antennas

    def available(self, environment: Site, part: Part) -> int | None:
        """None: as many rows as are asked for."""
        return None

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        """Rows start … stop-1 of the stream: (stop-start, 2, A, D) float32 in [0, 1]."""
        check_range(start, stop, None)
        rows = np.empty((stop - start, 2, *self.size), np.float32)
        of_rays = self._eigenvectors if self._vectors else self._images
        self._fill(rows, environment, part, start, of_rays)
        return rows

    def user_borders(self, environment: Site, part: Part) -> None:
        """None: each row is a user's only one."""

    def frequency_rows(
        self, environment: Site, part: Part, start: int, stop: int
    ) -> NDArray[np.complex64]:
        """The untruncated channels of the same samples as `rows`, for the cosine similarity.

        Returns:
            (stop-start, A, 125) complex64, angles and frequencies in CsiNet's convention (see
            `images.frequencies_of_rays`); the scale is the rays', not the images'.
        """
        check_range(start, stop, None)
        rows = np.empty((stop - start, self.size[0], FREQUENCIES), np.complex64)
        self._fill(rows, environment, part, start, self._frequencies)
        return rows

    def identity(self, environment: Site, part: Part) -> dict[str, Any]:
        """Version of the generator, and the stream that the rows are taken from."""
        kind = {"kind": self.kind} if self._vectors else {}
        return kind | {
            "generator": f"csipipe synthetic {VERSION}",
            "stream": f"seed {self._seed}, {environment}, {part}, blocks of {BLOCK} rows",
        }

    def _fill(
        self,
        rows: NDArray[Any],
        environment: Site,
        part: Part,
        start: int,
        of_rays: Callable[[Rays], NDArray[Any]],
    ) -> None:
        """Fill `rows` with the stream from row `start` on, in the form that `of_rays` gives it."""
        stop = start + len(rows)
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            begin, end = max(start, first), min(stop, first + BLOCK)
            rng = generator(self._seed, environment, part, block)
            made = of_rays(draw_rays(SCENARIOS[environment], BLOCK, rng))
            rows[begin - start : end - start] = made[begin - first : end - first]

    def _images(self, rays: Rays) -> Images:
        return to_unit(
            images_of_rays(
                rays.gain,
                rays.frequency,
                rays.delay,
                angles=self.size[0],
                delays=self.size[1],
                subcarriers=SUBCARRIERS,
            )
        )

    def _eigenvectors(self, rays: Rays) -> Images:
        over_antennas = np.fft.ifft(self._frequencies(rays), axis=1)  # the angle DFT undone
        return to_image(images_of(over_antennas[:, None], self.size[1]))

    def _frequencies(self, rays: Rays) -> NDArray[np.complex64]:
        return frequencies_of_rays(rays.gain, rays.frequency, rays.delay, angles=self.size[0])


def open_source(data: DataSettings, angles: int | None, delays: int | None) -> SyntheticSource:
    """As `csipipe.channels.open_source`."""
    return SyntheticSource(data.seed, angles, delays, data.kind or "channel")
