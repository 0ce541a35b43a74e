"""Channels as a picture: a few images, and the mean profiles over both axes.

Drawn without pyplot, so that no display is needed; in grey, so that it prints well.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from csipipe.channels.format import Description
from csipipe.channels.scene import Scene
from csipipe.channels.source import Images
from csipipe.channels.statistics import measure, spaced
from csipipe.channels.transform import to_complex
from csipipe.settings.tables import KINDS, SOURCES, SourceSpec

SAMPLES = 3
_ANGLE = SourceSpec.axes[0]
_DELAY = "delay (bins of {:.4g} ns)"
_FLOOR_DB = -30.0
"""Weaker bins are white."""


def labels(said: Description) -> tuple[str, str]:
    """Labels of the axes of a converted folder's images; {}: the number of bins."""
    if (known := KINDS[said.kind].axes) is not None:
        return known
    angle, delay = SOURCES["files"].axes
    with suppress(KeyError, TypeError, ValueError):  # only generated folders have a scene
        delay = _DELAY.format(1e3 / Scene(**said.made["scene"]).bandwidth_mhz)
    return angle if said.planar else _ANGLE, delay


def draw(sets: Mapping[str, Images], output: Path, axes: tuple[str, str]) -> None:
    """Write a PNG with one row of panels per set.

    Args:
        sets: images (n, 2, A, D) in [0, 1], n at least 1, by title.
        output: the file, replaced if it exists.
        axes: labels of angles and delays, which begin with what they are; {} is replaced by the
            number of bins.

    Raises:
        ValueError: `output` doesn't end in .png, or a set has no row with energy.
        OSError: it can't be written.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"output is {output}; expected a file name that ends in .png.")
    columns = SAMPLES + 2
    layout = ConstrainedLayoutEngine(wspace=0.04)
    figure = Figure(figsize=(3.1 * columns, 3.3 * len(sets)), layout=layout)
    lines = figure.subfigures(len(sets), 1, squeeze=False)[:, 0]
    for line, (title, images) in zip(lines, sets.items(), strict=True):
        line.suptitle(title, fontsize="medium", fontweight="bold")
        angle, delay = (axes[n].format(images.shape[2 + n]) for n in range(2))
        panels = line.subplots(1, columns, width_ratios=[1] * SAMPLES + [1.2, 1.2])
        few = to_complex(spaced(images, SAMPLES))
        for axis in panels[len(few) : SAMPLES]:
            axis.set_axis_off()
        for number, (axis, sample) in enumerate(zip(panels[:SAMPLES], few, strict=False), 1):
            shown = _sample(axis, sample, number, angle, delay)
        line.colorbar(shown, ax=panels[:SAMPLES], label="magnitude (dB of the peak)", pad=0.01)
        found = measure(images)
        _profile(panels[-2], found.delay_profile, delay)
        _profile(panels[-1], found.angle_profile, angle)
    figure.savefig(output, dpi=120, format="png")


def _sample(
    axis: Axes, sample: NDArray[np.complex64], number: int, angle: str, delay: str
) -> object:
    """One image (A, D): magnitude in dB of its peak."""
    magnitude = np.abs(sample)
    peak = max(float(magnitude.max()), 1e-12)
    level_db = 20 * np.log10(np.maximum(magnitude / peak, 1e-6))
    shown = axis.imshow(
        level_db, cmap="Greys", vmin=_FLOOR_DB, vmax=0, origin="lower", interpolation="nearest"
    )
    axis.set_title(f"sample {number}", fontsize="small")
    axis.set_xlabel(delay)
    if number == 1:
        axis.set_ylabel(angle)
    else:
        axis.tick_params(labelleft=False)
    return shown


def _profile(axis: Axes, profile: NDArray[np.float64], label: str) -> None:
    """Mean energy per bin, in percent."""
    axis.set_title(f"mean {label.split()[0]} profile", fontsize="small")
    axis.set_ylabel("share of energy (%)")
    axis.bar(np.arange(len(profile)), 100 * profile, color="0.35", width=0.8)
    axis.set_xlabel(label)
    axis.set_xlim(-0.7, len(profile) - 0.3)
