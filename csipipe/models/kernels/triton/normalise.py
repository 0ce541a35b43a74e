"""Triton kernels of a BatchNorm by itself: moments, output, and both halves of the way back.

One program does one tile (BLOCK pixels) of one channel of one image. Tiles' sums are ended by
`norm`, whose tables are read here; images of a group share one, so many (`share`) after each other.

A LeakyReLU may follow: SLOPE is 1 where none does. Numbers are rounded where a LeakyReLU by itself
would store them, so that they are the same to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton.norm import at_input


@triton.jit
def _place(share, A: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Where this program's pixels are, which of them are in the image, its group."""
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    pixel = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    at = (image * tl.num_programs(1) + tl.program_id(1)) * (A * D) + pixel
    return at, pixel < A * D, image // share


@triton.jit
def _leaky(z, v, of, SLOPE: tl.constexpr):
    """`v`, and where z isn't positive SLOPE v, rounded to the type of what `of` points to."""
    return tl.where(z > 0, v, (SLOPE * v).to(of.dtype.element_ty).to(tl.float32))


@triton.jit(do_not_specialize=["programs"])
def moments(
    x,
    part,
    programs,
    A: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each tile's mean and sum of squared deviations from it, and its pixels."""
    pid = tl.program_id(0)
    c = tl.program_id(1)
    channels = tl.num_programs(1)
    at, valid, _ = _place(1, A, D, TILES, BLOCK)
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    count = tl.minimum(BLOCK, A * D - (pid % TILES) * BLOCK).to(tl.float32)
    mean = tl.sum(v) / count
    off = tl.where(valid, v - mean, 0.0)
    tl.store(part + c * programs + pid, mean)
    tl.store(part + (channels + c) * programs + pid, tl.sum(off * off))
    tl.store(part + 2 * channels * programs + pid, count, mask=c == 0)


@triton.jit(do_not_specialize=["share"])
def normalise(
    x,
    stats,
    y,
    share,
    A: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """The output."""
    channels = tl.num_programs(1)
    at, valid, group = _place(share, A, D, TILES, BLOCK)
    table = stats + group * (4 * channels) + tl.program_id(1)
    v = tl.load(x + at, mask=valid).to(tl.float32)
    v = v * tl.load(table + 2 * channels) + tl.load(table + 3 * channels)
    if SLOPE != 1:
        v = v.to(y.dtype.element_ty).to(tl.float32)
        v = _leaky(v, v, y, SLOPE)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["programs", "share"])
def gradient_sums(
    g,
    x,
    stats,
    part,
    programs,
    share,
    A: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Each tile's sums of the gradient behind BatchNorm, and of its products with x - mean."""
    pid = tl.program_id(0)
    c = tl.program_id(1)
    channels = tl.num_programs(1)
    at, valid, group = _place(share, A, D, TILES, BLOCK)
    table = stats + group * (4 * channels) + c
    mean = tl.load(table)
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    d = tl.load(g + at, mask=valid, other=0.0).to(tl.float32)
    if SLOPE != 1:
        z = v * tl.load(table + 2 * channels) + tl.load(table + 3 * channels)
        d = _leaky(z, d, g, SLOPE)
    tl.store(part + c * programs + pid, tl.sum(d))
    tl.store(part + (channels + c) * programs + pid, tl.sum(d * (v - mean)))


@triton.jit(do_not_specialize=["share"])
def gradient(
    g,
    x,
    stats,
    coef,
    dx,
    share,
    A: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """The gradient at the input."""
    c = tl.program_id(1)
    channels = tl.num_programs(1)
    at, valid, group = _place(share, A, D, TILES, BLOCK)
    table = stats + group * (4 * channels) + c
    coef += group * (2 * channels) + c
    v = tl.load(x + at, mask=valid).to(tl.float32)
    d = tl.load(g + at, mask=valid).to(tl.float32)
    if SLOPE != 1:
        z = v * tl.load(table + 2 * channels) + tl.load(table + 3 * channels)
        d = _leaky(z, d, g, SLOPE)
    d = at_input(d, v, table, coef, channels)
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=valid)
