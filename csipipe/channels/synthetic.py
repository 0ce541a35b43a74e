"""Channels made on demand: a stream per seed, environment and part, in blocks of fixed size.

Every block has its own random generator, so row i is the same however many rows are made, and a
UE makes only the blocks that its rows lie in.
"""

from __future__ import annotations

import numpy as np

from csipipe.channels.images import images_of_rays
from csipipe.channels.scenario import SCENARIOS, SUBCARRIERS, draw_rays
from csipipe.channels.source import Images, Part, Site, check_range
from csipipe.channels.transform import to_unit

BLOCK = 128
"""Rows per block. Part of the stream's definition: another size makes other channels."""

_SITES: tuple[Site, ...] = ("indoor", "outdoor")
_PARTS: tuple[Part, ...] = ("train", "test")


def generator(seed: int, environment: Site, part: Part, block: int) -> np.random.Generator:
    """The random numbers of one block, independent of those of every other."""
    stream = (seed, _SITES.index(environment), _PARTS.index(part), block)
    return np.random.default_rng(np.random.SeedSequence(stream))


class SyntheticSource:
    """Clustered multipath on a half-wavelength array, 1024 subcarriers in 20 MHz.

    Args:
        seed: names the streams; the same seed makes the same rows.
        angles: antennas and angular bins A.
        delays: delay bins D kept of the 1024.

    Raises:
        ValueError: more delays than subcarriers.
    """

    def __init__(self, seed: int, angles: int, delays: int) -> None:
        if delays > SUBCARRIERS:
            raise ValueError(
                f"model.delays is {delays}; the channel has {SUBCARRIERS} delay bins. "
                f"Set it to 1 … {SUBCARRIERS}."
            )
        self._seed = seed
        self._angles = angles
        self._delays = delays

    def available(self, environment: Site, part: Part) -> int | None:
        """None: as many rows as are asked for."""
        return None

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        """Rows start … stop-1 of the stream: (stop-start, 2, A, D) float32 in [0, 1]."""
        check_range(start, stop, None)
        rows = np.empty((stop - start, 2, self._angles, self._delays), np.float32)
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            begin, end = max(start, first), min(stop, first + BLOCK)
            rows[begin - start : end - start] = self._block(environment, part, block)[
                begin - first : end - first
            ]
        return rows

    def _block(self, environment: Site, part: Part, block: int) -> Images:
        rng = generator(self._seed, environment, part, block)
        rays = draw_rays(SCENARIOS[environment], BLOCK, rng)
        return to_unit(
            images_of_rays(
                rays.gain,
                rays.frequency,
                rays.delay,
                angles=self._angles,
                delays=self._delays,
                subcarriers=SUBCARRIERS,
            )
        )
