"""How figures are distributed over samples, as cumulative curves: readable in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from csipipe import plotting
from csipipe.evaluation.summary import Evaluated

_LABELS = {
    "nmse_db": "centred NMSE of a sample (dB)",
    "rho": "cosine similarity ρ of a sample",
    "sgcs": "SGCS of a sample",
}
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_GREYS = ("black", "0.45", "0.65")
_POINTS = 500


def draw(runs: Sequence[tuple[str, Evaluated]], title: str, file: Path) -> None:
    """Write a PNG: share of samples below a value; one run with its UEs, or a line per run."""
    shown = [name for name in _LABELS if len(runs[0][1].pooled(name))]
    figure = Figure(figsize=(4.2 * len(shown), 3.6), layout="constrained")
    plotting.entitle(figure, title)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, name in zip(axes, shown, strict=True):
        if len(runs) == 1:
            _ues(axis, runs[0][1], name)
        else:
            for number, (label, evaluated) in enumerate(runs):
                look = {
                    "linestyle": _LINES[number % len(_LINES)],
                    "color": _GREYS[number // len(_LINES) % len(_GREYS)],
                }
                _curve(axis, evaluated.pooled(name), label=label, **look)
        axis.set_xlabel(_LABELS[name])
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        if name != "nmse_db":
            axis.set_xlim(right=1)
    axes[0].set_ylabel("share of samples below")
    axes[0].legend(fontsize="small", loc="upper left")
    plotting.save(figure, file)


def _ues(axis: Axes, evaluated: Evaluated, name: str) -> None:
    """Every UE in thin grey, all together in black."""
    for ue in range(len(evaluated.samples)):
        label = "each UE" if ue == 0 else None
        _curve(axis, evaluated.pooled(name, ue), color="0.6", linewidth=0.8, label=label)
    _curve(axis, evaluated.pooled(name), color="black", linewidth=1.8, label="all UEs")


def _curve(axis: Axes, values: Tensor, **look: Any) -> None:
    """The empirical distribution, thinned out to what a picture can show."""
    ordered = values[values.isfinite()].sort().values
    picks = torch.linspace(0, len(ordered) - 1, min(_POINTS, len(ordered))).round().long()
    axis.plot(ordered[picks], (picks + 1) / len(ordered), **look)
