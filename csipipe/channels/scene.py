"""What a generator of whole channels is asked for: arrays, band, motion; and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.transform import Geometry

Responses = NDArray[np.complex64]
"""(B, T, R, P, K): users, snapshots, receive antennas, ports, subcarriers. A ray of complex gain g,
spatial frequencies u, w (cycles per column and per row) and delay t (seconds) is
g exp(j 2 pi (u n1 + w n2)) exp(-j 2 pi t k BW / K)."""
BLOCK = 64
"""Users of a block. Every block has random numbers of its own, so that a user's channels are the
same however many are asked for; another size gives other channels."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The arrays, the band, and how users move.

    Raises:
        ValueError: a value that can't be used.
    """

    columns: int = 32
    """N1: columns of the BTS's array, half a wavelength apart."""
    rows: int = 1
    """N2: rows of it."""
    polarisations: int = 1
    """1, or 2: crossed dipoles at ±45°."""
    receive: int = 1
    """Receive antennas of a UE, in a line, half a wavelength apart."""
    carrier_ghz: float = 3.5
    bandwidth_mhz: float = 20.0
    subcarriers: int = 256
    """K, over the whole bandwidth."""
    delay_spread_ns: float = 100.0
    """RMS delay spread of the CDL models, which scale with it (TR 38.901, 7.7.3)."""
    speed_kmh: float = 3.0
    """Highest speed; each UE's is uniform from 0 on."""
    snapshots: int = 1
    """T: snapshots of a UE."""
    interval_ms: float = 5.0
    """Between two snapshots."""

    def __post_init__(self) -> None:
        for name in ("columns", "rows", "receive", "subcarriers", "snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.polarisations not in (1, 2):
            raise ValueError(f"polarisations is {self.polarisations}; it must be 1 or 2.")
        for name in ("carrier_ghz", "bandwidth_mhz", "delay_spread_ns", "interval_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be positive and finite.")
        if not (math.isfinite(self.speed_kmh) and self.speed_kmh >= 0):
            raise ValueError(f"speed_kmh is {self.speed_kmh}; it must be at least 0 and finite.")

    @property
    def ports(self) -> int:
        """P = polarisations x columns x rows."""
        return self.polarisations * self.columns * self.rows

    @property
    def geometry(self) -> Geometry:
        """How the ports are numbered: as 3GPP does."""
        return Geometry(columns=self.columns, rows=self.rows, polarisations=self.polarisations)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, R, P, K): one user's channels."""
        return self.snapshots, self.receive, self.ports, self.subcarriers


Block = Callable[[Scene, str, int], Responses]
"""`block(scene, model, seed)`: the channels of `BLOCK` users."""


def stream(
    block: Block, scene: Scene, model: str, seed: int, part: int, users: int
) -> Iterator[Responses]:
    """The first `users` of a stream, block by block.

    Args:
        part: number of the set: sets of one seed share no user.
    """
    for number, start in enumerate(range(0, users, BLOCK)):
        drawn = np.random.SeedSequence((seed, part, number)).generate_state(1)[0]
        yield block(scene, model, int(drawn))[: users - start]
