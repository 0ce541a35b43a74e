"""Our own clusters (see `scenario`) on planar arrays of one or two polarisations.

The azimuths are those of the linear array's generator. A ray's elevation is that of the UE, seen
from a BTS that stands higher, plus Laplacian deviations of its cluster and of its own. The two
polarisations of a port fade independently, with the same mean power, as they do where scattering
is rich; receive antennas see each ray from a direction of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csipipe.channels.scenario import BIN_NS, LIGHT_M_PER_NS, SCENARIOS, draw_rays
from csipipe.channels.scene import BLOCK, Responses, Scene


@dataclass(frozen=True, kw_only=True)
class _Heights:
    above_m: float
    """Of the BTS above the UE."""
    cluster_deg: float
    """Mean deviation of a cluster's elevation from the UE's (Laplacian)."""
    ray_deg: float
    """Mean deviation of a ray's elevation from its cluster's (Laplacian)."""


_HEIGHTS = {
    "indoor": _Heights(above_m=1.5, cluster_deg=10.0, ray_deg=5.0),
    "outdoor": _Heights(above_m=23.5, cluster_deg=4.0, ray_deg=1.0),
}
MODELS = tuple(_HEIGHTS)
_METRES_PER_S = 1 / 3.6
_LIGHT_M_PER_S = 1e9 * LIGHT_M_PER_NS


def block(scene: Scene, model: str, seed: int) -> Responses:
    """As `scene.Block`; `model` is one of `MODELS`."""
    rng = np.random.default_rng(seed)
    laws, scenario = _HEIGHTS[model], SCENARIOS[model]
    rays = draw_rays(scenario, BLOCK, rng)  # (B, C·N), clusters of N rays
    shape = rays.delay.shape

    # the first path is the direct one: its delay is the UE's distance
    distance_m = rays.delay.min(axis=1, keepdims=True) * BIN_NS * LIGHT_M_PER_NS
    cluster = rng.laplace(0.0, np.deg2rad(laws.cluster_deg), (BLOCK, scenario.clusters))
    cluster[:, 0] = 0
    elevation = -np.arctan2(laws.above_m, distance_m) + np.repeat(cluster, scenario.rays, axis=1)
    elevation = elevation + rng.laplace(0.0, np.deg2rad(laws.ray_deg), shape)
    horizontal = rays.frequency * np.cos(elevation)
    vertical = np.sin(elevation) / 2
    arrival = rng.uniform(0, 2 * np.pi, shape)

    def steering(turns: np.ndarray, size: int) -> np.ndarray:
        """(B, rays, size)."""
        return np.exp(2j * np.pi * turns[..., None] * np.arange(size))

    columns, rows = steering(horizontal, scene.columns), steering(vertical, scene.rows)
    array_BRA = (columns[..., :, None] * rows[..., None, :]).reshape(*shape, -1)
    fading = rng.standard_normal((scene.polarisations, *shape, 2)).view(np.complex128)[..., 0]
    fading[0] = np.sqrt(2)  # the linear array's own gains are drawn already
    ports_BRP = np.concatenate([(gain / np.sqrt(2))[..., None] * array_BRA for gain in fading], 2)
    # delays in bins of 50 ns, whatever the bandwidth
    cycles = rays.delay * BIN_NS * scene.bandwidth_mhz / 1e3 / scene.subcarriers
    band_BRK = np.exp(-2j * np.pi * cycles[..., None] * np.arange(scene.subcarriers))
    antennas_BRr = steering(np.sin(arrival) / 2, scene.receive)
    speed = rng.uniform(0, scene.speed_kmh * _METRES_PER_S, (BLOCK, 1))
    heading = rng.uniform(0, 2 * np.pi, (BLOCK, 1))
    doppler_hz = speed * scene.carrier_ghz * 1e9 / _LIGHT_M_PER_S * np.cos(arrival - heading)
    times_BRT = np.exp(
        2j * np.pi * doppler_hz[..., None] * np.arange(scene.snapshots) * scene.interval_ms * 1e-3
    )
    weights_BRTr = rays.gain[..., None, None] * times_BRT[..., None] * antennas_BRr[..., None, :]
    side_BRTrP = weights_BRTr[..., None] * ports_BRP[:, :, None, None]
    flat = side_BRTrP.reshape(*shape, -1).astype(np.complex64).transpose(0, 2, 1)
    found: Responses = np.matmul(flat, band_BRK.astype(np.complex64))
    return found.reshape(BLOCK, *scene.shape)
