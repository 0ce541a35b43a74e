"""The pipeline's timeline: ranks down, time across. Only rank 0 of a profiled run imports this.

Kinds of work differ in lightness and hatching, so that they are distinguishable in grey too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from csipipe.files import whole
from csipipe.profiling.spans import Row, Span, idle

_WIDTH, _ROW, _FRAME = 12.0, 0.42, 1.55
"""Inches: the picture's width, a rank's height, and what title, axis and legend take."""
_TIME = (0.15, 0.885)
"""Where the time axis begins and ends, as shares of the width."""
_POINTS = 7.0
_DIGIT = 0.62
"""Width of a digit, in units of the font size."""


@dataclass(frozen=True)
class Kind:
    """How spans of one kind look: fill, hatching, and the colour of the number on them."""

    label: str
    fill: str
    ink: str = "black"
    hatch: str | None = None


FORWARD = Kind("forward", "#a9d3f0")
HEAD = Kind("head: forward, loss, backward", "#7fb069", hatch="\\\\\\")
BACKWARD = Kind("backward", "#1f5fa8", "white")
WEIGHTS = Kind("weight gradients", "#f2b84b", hatch="///")
LOCAL = Kind("local step", "#1f5fa8", "white")
MEAN = Kind("aggregate, apply", "#b48ad0", hatch="xxx")
OTHER = Kind("optimiser, other", "#8a8a8a")
SEND = Kind("send", "#6b0f0f", "white")
WAIT = Kind("wait", "#ffffff", "0.45", "....")
_KINDS = {
    "forward": FORWARD,
    "encode": FORWARD,
    "head": HEAD,
    "backward": BACKWARD,
    "encode backward": BACKWARD,
    "weight gradients": WEIGHTS,
    "local step of UE": LOCAL,
    "aggregate UE": MEAN,
    "apply the mean at UE": MEAN,
}
_ORDER = (FORWARD, HEAD, BACKWARD, WEIGHTS, LOCAL, MEAN, OTHER, SEND, WAIT)


def kind_of(span: Span) -> Kind:
    """What a span looks like."""
    if span.activity == "compute":
        return _KINDS.get(span.what, OTHER)
    return SEND if span.activity == "send" else WAIT


@dataclass(frozen=True)
class Timeline:
    """What the picture shows.

    Attributes:
        rows: one per rank, of one iteration.
        bubbles: share of each rank's time without computing, over all recorded iterations.
        title: lines above.
        numbers: what the numbers on the spans count.
    """

    rows: Sequence[Row]
    bubbles: Sequence[float]
    title: str
    numbers: str

    @classmethod
    def of(cls, rows: Sequence[Row], iteration: int, title: str, numbers: str) -> Timeline:
        """One iteration of what was recorded."""
        return cls([row.of(iteration) for row in rows], [*map(idle, rows)], title, numbers)


def draw(timeline: Timeline) -> Figure:
    """The picture."""
    rows = timeline.rows
    height = _FRAME + _ROW * len(rows)
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (_TIME[0], 0.85 / height, _TIME[1] - _TIME[0], _ROW * len(rows) / height)
    )
    start = min(span.begin for row in rows for span in row.spans)
    length = max(span.end for row in rows for span in row.spans) - start
    unit, name = (1e9, "s") if length > 2e9 else (1e6, "ms")
    scale = 1 / unit
    for place, row in enumerate(rows):
        for span in row.spans:
            _draw_span(axes, place, span, start, scale, length)
    axes.set_xlim(0, length * scale)
    axes.set_xlabel(f"time ({name}); numbers: {timeline.numbers}", fontsize=8)
    _name_rows(axes, timeline)
    figure.text(0.01, 1 - 0.12 / height, timeline.title, fontsize=9, va="top")
    _explain(figure, rows)
    return figure


def _explain(figure: Figure, rows: Sequence[Row]) -> None:
    """The legend, with the kinds that occur."""
    used = {kind_of(span).label for row in rows for span in row.spans}
    figure.legend(
        handles=[
            Patch(facecolor=kind.fill, hatch=kind.hatch, edgecolor="0.3", label=kind.label)
            for kind in _ORDER
            if kind.label in used
        ],
        loc="lower center",
        ncols=len(_ORDER),
        fontsize=8,
        frameon=False,
        handlelength=2.2,
    )


def _draw_span(axes: Any, place: int, span: Span, start: int, scale: float, length: int) -> None:
    kind = kind_of(span)
    waiting = kind is WAIT
    x, width = (span.begin - start) * scale, (span.end - span.begin) * scale
    tall = 0.5 if waiting else 0.8
    axes.add_patch(
        Rectangle(
            (x, place - tall / 2),
            width,
            tall,
            facecolor=kind.fill,
            edgecolor="0.6" if waiting else "0.25",
            linewidth=0.3,
            hatch=kind.hatch,
            zorder=1 if waiting else 2,
        )
    )
    text = "" if span.number is None else str(span.number)
    inches = (span.end - span.begin) / length * _WIDTH * (_TIME[1] - _TIME[0])
    if span.activity == "compute" and inches * 72 > (len(text) * _DIGIT + 0.4) * _POINTS:
        axes.text(
            x + width / 2,
            place,
            text,
            color=kind.ink,
            fontsize=_POINTS,
            ha="center",
            va="center_baseline",
            zorder=3,
            bbox={"boxstyle": "square,pad=0.08", "facecolor": kind.fill, "edgecolor": "none"}
            if kind.hatch
            else None,
        )


def _name_rows(axes: Any, timeline: Timeline) -> None:
    """Roles left of the rows, bubble shares right of them."""
    rows = timeline.rows
    axes.set_ylim(len(rows) - 0.5, -0.5)
    names = [row.role.replace(" and ", "\n") for row in rows]  # a line for each role of a rank
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    transform = axes.get_yaxis_transform()
    axes.text(1.075, -0.6, "bubble", transform=transform, fontsize=8, ha="right", va="bottom")
    for place, share in enumerate(timeline.bubbles):
        axes.text(
            1.075, place, f"{share:.0%}", transform=transform, fontsize=8, ha="right", va="center"
        )


def save(figure: Figure, file: Path) -> None:
    """Write a PNG or SVG, by the file's ending; whole or not at all.

    Raises:
        OSError: it can't be written; no part of it remains.
    """
    with whole(file) as partial:
        figure.savefig(partial, dpi=130, format=file.suffix[1:])


def pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) bytes, as `save` writes them."""
    figure.set_dpi(130)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
