"""3GPP's channel models (TR 38.901) by Sionna, which is an extra: `pip install 'csipipe[sionna]'`.

CDL-A … CDL-E have fixed clusters, scaled to a delay spread; a UE differs in phases, in which ray of
a cluster meets which, and in its direction: the sector is turned by up to ±60°. UMi and UMa draw a
place in a sector, line of sight or not, indoors or not, and all large-scale parameters. Neither
path loss nor shadow fading is applied, since rows are scaled anyway. The BTS's elements have the
pattern of TR 38.901, the UE's are isotropic; delays count from the first path.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from csipipe.channels.scene import BLOCK, Responses, Scene

CDL = {f"cdl-{letter}": letter.upper() for letter in "abcde"}
DROPS = ("umi", "uma")
MODELS = (*DROPS, *CDL)
SPECIFICATION = "16.1"
"""Release of TR 38.901 whose tables are used."""
_SECTOR = math.radians(60)


def block(scene: Scene, model: str, seed: int) -> Responses:
    """As `scene.Block`; `model` is one of `MODELS`.

    Raises:
        ValueError: Sionna isn't installed.
    """
    import torch

    gain, delay = paths(scene, model, seed)
    spacing = scene.bandwidth_mhz * 1e6 / scene.subcarriers
    cycles = delay.double()[..., None] * spacing * torch.arange(scene.subcarriers)
    band = torch.exp(-2j * torch.pi * cycles).to(gain.dtype)
    found = torch.einsum("brpnt,bnk->btrpk", gain, band)
    responses: Responses = found.numpy().astype(np.complex64)
    return responses


def paths(
    scene: Scene,
    model: str,
    seed: int,
    pattern: str = "38.901",
    los: bool | None = None,
    indoor: float | None = None,
) -> tuple[Any, Any]:
    """Gains (B, R, P, paths, T), complex, and delays (B, paths) in seconds, of `BLOCK` users.

    Args:
        pattern: of the BTS's elements, as Sionna calls it.
        los, indoor: whether umi's and uma's UEs outdoors have line of sight, and the share of those
            indoors; None: drawn as the specification says.

    Raises:
        ValueError: Sionna isn't installed.
    """
    sionna = _sionna(model)
    import torch

    sionna.phy.config.seed = seed
    hertz = scene.carrier_ghz * 1e9
    bts = _array(scene, pattern)
    ue = _array(Scene(columns=scene.receive, carrier_ghz=scene.carrier_ghz), "omni")
    every = 1e3 / scene.interval_ms
    metres_per_s = scene.speed_kmh / 3.6
    common = {"ut_array": ue, "bs_array": bts, "direction": "downlink", "device": "cpu"}
    if model in CDL:
        turn = torch.zeros(BLOCK, 3)
        drawn = np.random.default_rng(seed).uniform(-_SECTOR, _SECTOR, BLOCK)
        turn[:, 0] = torch.from_numpy(drawn.astype(np.float32))
        channel = sionna.phy.channel.tr38901.CDL(
            CDL[model],
            scene.delay_spread_ns * 1e-9,
            hertz,
            bs_orientation=turn,
            max_speed=metres_per_s,
            spec_version=SPECIFICATION,
            **common,
        )
        gain, delay = channel(BLOCK, scene.snapshots, every)
    else:
        kind = {"umi": sionna.phy.channel.tr38901.UMi, "uma": sionna.phy.channel.tr38901.UMa}
        channel = kind[model](
            hertz,
            "low",
            enable_pathloss=False,
            enable_shadow_fading=False,
            spec_version=SPECIFICATION,
            **common,
        )
        channel.set_topology(
            *sionna.phy.channel.gen_single_sector_topology(
                BLOCK,
                1,
                model,
                indoor_probability=indoor,
                max_ut_velocity=metres_per_s,
                device="cpu",
            ),
            los="random" if los is None else los,
        )
        gain, delay = channel(scene.snapshots, every)
    return gain[:, 0, :, 0], delay[:, 0, 0]


def _array(scene: Scene, pattern: str) -> Any:
    """Sionna numbers ports as 3GPP does: polarisation, column, row, the last one fastest."""
    from sionna.phy.channel.tr38901 import PanelArray

    two = scene.polarisations == 2
    return PanelArray(
        num_rows_per_panel=scene.rows,
        num_cols_per_panel=scene.columns,
        polarization="dual" if two else "single",
        polarization_type="cross" if two else "V",
        antenna_pattern=pattern,
        carrier_frequency=scene.carrier_ghz * 1e9,
        device="cpu",
    )


def _sionna(model: str) -> Any:
    """Its package, imported only here: it takes seconds."""
    try:
        import sionna.phy
        import sionna.phy.channel.tr38901
    except ImportError as error:
        raise ValueError(
            f"--model {model} is computed by Sionna, which can't be imported ({error}); install it "
            "with: pip install 'csipipe[sionna]', or take --model indoor or outdoor."
        ) from error
    return sionna
