"""Originals beside their reconstructions, as a picture: the worst and the median sample.

Drawn with Pillow, in a hundredth of matplotlib's time, since a rank that draws holds up the others.
In grey, so that it prints well. Shapes: B rows, A angles, D delays.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from csipipe.measure.metrics import ZERO, centred_nmse, to_db

_FLOOR_DB = -30.0
"""Weaker bins are white."""
_SIDE = 256
"""Pixels of a panel's longer side, about."""
_LEFT, _TOP, _BETWEEN, _BELOW, _RIGHT = 78, 46, 34, 74, 112
_TITLE, _LABEL, _TICK = 22, 18, 16
"""Sizes of text: TensorBoard shows pictures at about half their size."""
_BLACK, _WHITE = 0, 255


def draw(h_BAD: Tensor, h_hat_BAD: Tensor, title: str, axes: tuple[str, str]) -> Image.Image:
    """The worst and the median of some samples by centred NMSE, a row of panels each.

    Args:
        h_BAD, h_hat_BAD: (B, 2, A, D) originals and reconstructions in [0, 1], B at least 1.
        title: the heading, to which the number of samples is added.
        axes: labels of angles and delays; {} is replaced by the number of bins.
    """
    nmse_B = centred_nmse(h_hat_BAD, h_BAD)
    worst, median = pick(nmse_B)
    rows, columns = h_BAD.shape[2:]
    zoom = max(1, _SIDE // max(rows, columns))
    wide, high = columns * zoom, rows * zoom
    line = high + _BETWEEN + _BELOW
    size = (_LEFT + 2 * wide + _BETWEEN + _RIGHT, _TOP + 2 * line)
    image = Image.new("L", size, _WHITE)
    pen = ImageDraw.Draw(image)
    pen.text((_LEFT, 10), f"{title}: {len(h_BAD):,} test samples", _BLACK, _font(_TITLE))
    for number, (name, sample) in enumerate((("worst", worst), ("median", median))):
        top = _TOP + number * line + _BETWEEN
        nmse_db = to_db(float(nmse_B[sample]))
        peak = _magnitude(h_BAD[sample]).max()
        heads = (f"{name} sample, NMSE {nmse_db:.1f} dB", "reconstruction")
        for place, (h, head) in enumerate(zip((h_BAD, h_hat_BAD), heads, strict=True)):
            left = _LEFT + place * (wide + _BETWEEN)
            panel = _grey(_magnitude(h[sample]), peak)
            image.paste(panel.resize((wide, high), Image.Resampling.NEAREST), (left, top))
            pen.text((left, top - 6), head, _BLACK, _font(_LABEL), anchor="ls")
            _axes(image, pen, (left, top, zoom), (rows, columns), axes, place == 0)
        _bar(pen, _LEFT + 2 * wide + _BETWEEN + 14, top, high)
    return image


def pick(nmse_B: Tensor) -> tuple[int, int]:
    """The worst and the median sample; those without energy, which have no NMSE, don't count.

    With an even number, the median is the worse of the two in the middle.
    """
    order = nmse_B.argsort()
    order = order[nmse_B[order].isfinite()]
    if not len(order):
        return 0, 0
    return int(order[-1]), int(order[len(order) // 2])


def _magnitude(h_AD: Tensor) -> Tensor:
    """(A, D), linear, of one image (2, A, D)."""
    magnitude_AD: Tensor = torch.linalg.vector_norm(h_AD - ZERO, dim=0)
    return magnitude_AD


def _grey(magnitude_AD: Tensor, peak: Tensor) -> Image.Image:
    """dB of the original's peak: 0 is black. Angles go up."""
    level_db = 20 * torch.log10((magnitude_AD / peak.clamp(min=1e-12)).clamp(min=1e-6))
    grey = (level_db / _FLOOR_DB).clamp(0, 1) * _WHITE
    return Image.fromarray(grey.flip(0).to(torch.uint8).numpy())


def _axes(
    image: Image.Image,
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int, int],
    bins: tuple[int, int],
    labels: tuple[str, str],
    first: bool,
) -> None:
    """Frame, ticks and labels of a panel at (left, top) with so many pixels per bin."""
    left, top, zoom = place
    rows, columns = bins
    bottom = top + rows * zoom
    pen.rectangle((left - 2, top - 2, left + columns * zoom + 1, bottom + 1), None, _BLACK, 2)
    for tick in range(0, columns, max(1, columns // 4)):
        x = left + tick * zoom + zoom // 2
        pen.line((x, bottom, x, bottom + 6), _BLACK, 2)
        pen.text((x, bottom + 10), str(tick), _BLACK, _font(_TICK), anchor="mt")
    middle = left + columns * zoom // 2
    pen.text((middle, bottom + 32), labels[1].format(columns), _BLACK, _font(_LABEL), anchor="mt")
    for tick in range(0, rows, max(1, rows // 4)):
        y = bottom - tick * zoom - zoom // 2
        pen.line((left - 7, y, left - 1, y), _BLACK, 2)
        if first:
            pen.text((left - 11, y), str(tick), _BLACK, _font(_TICK), anchor="rm")
    if first:
        text = labels[0].format(rows)
        label = Image.new("L", (int(pen.textlength(text, _font(_LABEL))) + 2, 24), _WHITE)
        ImageDraw.Draw(label).text((1, 0), text, _BLACK, _font(_LABEL))
        label = label.rotate(90, expand=True)
        image.paste(label, (left - 66, top + (rows * zoom - label.height) // 2))


def _bar(pen: ImageDraw.ImageDraw, left: int, top: int, high: int) -> None:
    """The scale of grey."""
    for y in range(high):
        pen.line((left, top + y, left + 13, top + y), int(_WHITE * y / max(1, high - 1)))
    pen.rectangle((left - 2, top - 2, left + 15, top + high + 1), None, _BLACK, 2)
    for level_db in range(0, int(_FLOOR_DB) - 1, -10):
        y = top + int((high - 1) * level_db / _FLOOR_DB)
        pen.line((left + 15, y, left + 20, y), _BLACK, 2)
        pen.text((left + 24, y), f"{level_db} dB", _BLACK, _font(_TICK), anchor="lm")
    pen.text((left - 1, top + high + 14), "of original's\npeak", _BLACK, _font(_TICK))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
