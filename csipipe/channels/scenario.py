"""Geometric clustered multipath: where a UE stands and which rays reach it.

The laws are the usual ones of cluster models (Saleh and Valenzuela 1987; 3GPP TR 38.901, clause
7.5): the BTS in the middle of a square, the UE uniform in it, the direct path first, then
clusters of rays with exponential excess delays, powers that decay with delay and scatter
lognormally, and Laplacian angular spreads. The figures in `SCENARIOS` bring the images close to
those of COST 2100 in its two environments; they don't model any particular site.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csipipe.channels.source import Site

Reals = NDArray[np.float64]

LIGHT_M_PER_NS = 0.299792458
BANDWIDTH_MHZ = 20.0
SUBCARRIERS = 1024
BIN_NS = 1e3 / BANDWIDTH_MHZ
"""Width of a delay bin: 50 ns."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Geometry and spreads of one environment."""

    square_m: float
    """Side of the square in which the UEs are placed uniformly; the BTS is at its centre."""
    clusters: int
    """Clusters per UE, including the one around the direct path."""
    rays: int
    """Rays per cluster, of equal mean power."""
    direct_db: float
    """Mean power of the first cluster above that of a later one without excess delay."""
    cluster_delay_ns: float
    """Mean excess delay of the clusters after the first (exponential)."""
    decay_ns: float
    """Excess delay after which a cluster's mean power has fallen to 1/e."""
    scatter_db: float
    """Standard deviation of a cluster's power around that law (lognormal)."""
    cluster_angle_deg: float
    """Mean deviation of a cluster's azimuth from the UE's (Laplacian)."""
    ray_delay_ns: float
    """Mean excess delay of a ray within its cluster (exponential)."""
    ray_angle_deg: float
    """Mean deviation of a ray's azimuth from its cluster's (Laplacian)."""


SCENARIOS: dict[Site, Scenario] = {
    "indoor": Scenario(
        square_m=20.0,
        clusters=3,
        rays=4,
        direct_db=10.0,
        cluster_delay_ns=190.0,
        decay_ns=170.0,
        scatter_db=2.0,
        cluster_angle_deg=60.0,
        ray_delay_ns=0.3,
        ray_angle_deg=40.0,
    ),
    "outdoor": Scenario(
        square_m=400.0,
        clusters=7,
        rays=4,
        direct_db=12.0,
        cluster_delay_ns=750.0,
        decay_ns=750.0,
        scatter_db=3.0,
        cluster_angle_deg=35.0,
        ray_delay_ns=3.0,
        ray_angle_deg=9.0,
    ),
}


@dataclass(frozen=True)
class Rays:
    """Rays of B channels, R each."""

    gain: NDArray[np.complex128]
    """(B, R) complex amplitude, linear; the scale is arbitrary."""
    frequency: Reals
    """(B, R) spatial frequency at a half-wavelength array, cycles per antenna: sin(azimuth) / 2."""
    delay: Reals
    """(B, R) in delay bins of 1 / bandwidth."""


def draw_rays(scenario: Scenario, count: int, rng: np.random.Generator) -> Rays:
    """Rays of `count` UEs, each at its own place."""
    shape = (count, scenario.clusters, scenario.rays)
    per_cluster, per_ray = (*shape[:2], 1), shape

    place = rng.uniform(-0.5, 0.5, (2, count, 1, 1)) * scenario.square_m
    azimuth = np.arctan2(place[1], place[0])
    direct_ns = np.hypot(place[0], place[1]) / LIGHT_M_PER_NS

    later = np.arange(scenario.clusters)[:, None] > 0  # the first cluster is the direct path's
    excess_ns = rng.exponential(scenario.cluster_delay_ns, per_cluster) * later
    turn = rng.laplace(0.0, np.deg2rad(scenario.cluster_angle_deg), per_cluster) * later
    power_db = rng.normal(0.0, scenario.scatter_db, per_cluster) + scenario.direct_db * ~later
    amplitude = 10 ** (power_db / 20) * np.exp(-excess_ns / (2 * scenario.decay_ns))

    ray_ns = rng.exponential(scenario.ray_delay_ns, per_ray)
    ray_turn = rng.laplace(0.0, np.deg2rad(scenario.ray_angle_deg), per_ray)
    fading = rng.standard_normal((*per_ray, 2)).view(np.complex128)[..., 0]

    flat = (count, -1)
    return Rays(
        gain=(amplitude * fading).reshape(flat),
        frequency=(np.sin(azimuth + turn + ray_turn) / 2).reshape(flat),
        delay=((direct_ns + excess_ns + ray_ns) / BIN_NS).reshape(flat),
    )
