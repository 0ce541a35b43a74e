"""Triton kernels of what a CRBlock does pixel by pixel: join, output, activations, both ways.

g is the gradient at a BatchNorm's output. The gradient at the join's input has 14 channels that
are two channels' products with the join's weights, so it is recomputed wherever it is needed.
Conventions as in `convolve`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton.norm import at_input
from csipipe.models.kernels.triton.window import SLOPE, add2, add4, leaky, store_sums, sums


@triton.jit
def store_moments(values, valid, count, part, pid, programs, N: tl.constexpr):
    """One tile's mean and sum of squared deviations from it, of N channels, and its pixels."""
    tl.store(part + 2 * N * programs + pid, count)
    total = sums(values, N)
    means = (total[0] / count,)
    for n in tl.static_range(1, N):
        means = means + (total[n] / count,)
    first = tl.where(valid, values[0] - means[0], 0.0)
    squares = (first * first,)
    for n in tl.static_range(1, N):
        off = tl.where(valid, values[n] - means[n], 0.0)
        squares = squares + (off * off,)
    store_sums(means, sums(squares, N), part, pid, programs, N)


@triton.jit(do_not_specialize=["programs"])
def join_forward(
    q,
    stats,
    weight,
    j,
    part,
    programs,
    A: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRAIN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1×1 convolution of all paths' activated outputs to two channels, and its moments."""
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    first = (pid % TILES) * BLOCK
    pixel = first + tl.arange(0, BLOCK)
    valid = pixel < A * D
    source = q + image * (CHANNELS * A * D) + pixel
    acc0 = tl.zeros((BLOCK,), tl.float32)
    acc1 = tl.zeros((BLOCK,), tl.float32)
    for c in range(CHANNELS):
        v = tl.load(source + c * (A * D), mask=valid, other=0.0).to(tl.float32)
        v = leaky(v * tl.load(stats + 2 * CHANNELS + c) + tl.load(stats + 3 * CHANNELS + c))
        acc0 += v * tl.load(weight + c)
        acc1 += v * tl.load(weight + CHANNELS + c)
    target = j + image * (2 * A * D) + pixel
    stored = (acc0.to(j.dtype.element_ty), acc1.to(j.dtype.element_ty))
    tl.store(target, stored[0], mask=valid)
    tl.store(target + A * D, stored[1], mask=valid)
    if TRAIN:
        zero = tl.zeros((BLOCK,), tl.float32)  # outside the image the shift is not zero
        a0 = tl.where(valid, stored[0].to(tl.float32), zero)
        a1 = tl.where(valid, stored[1].to(tl.float32), zero)
        count = tl.minimum(BLOCK, A * D - first).to(tl.float32)
        store_moments((a0, a1), valid, count, part, pid, programs, 2)


@triton.jit
def output_forward(
    x,
    j,
    stats,
    y,
    A: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """LeakyReLU of the input and the join's BatchNorm."""
    pid = tl.program_id(0)
    base = (pid // TILES).to(tl.int64) * (2 * A * D)
    pixel = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < A * D
    for c in tl.static_range(2):
        at = base + c * (A * D) + pixel
        z = tl.load(j + at, mask=valid).to(tl.float32) * tl.load(stats + 4 + c)
        z = z + tl.load(stats + 6 + c) + tl.load(x + at, mask=valid).to(tl.float32)
        tl.store(y + at, leaky(z).to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["programs"])
def output_backward(
    dy,
    x,
    j,
    stats,
    dz,
    part,
    programs,
    A: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient dz before the last LeakyReLU, and the join's BatchNorm's sums."""
    pid = tl.program_id(0)
    base = (pid // TILES).to(tl.int64) * (2 * A * D)
    pixel = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < A * D
    for c in tl.static_range(2):
        at = base + c * (A * D) + pixel
        v = tl.load(j + at, mask=valid, other=0.0).to(tl.float32)
        z = v * tl.load(stats + 4 + c) + tl.load(stats + 6 + c)
        z = z + tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=valid, other=0.0).to(tl.float32)
        stored = tl.where(z > 0, g, SLOPE * g).to(dz.dtype.element_ty)
        tl.store(dz + at, stored, mask=valid)
        g = stored.to(tl.float32)
        both = tl.reduce((g, g * (v - tl.load(stats + c))), 0, add2)
        tl.store(part + c * programs + pid, both[0])
        tl.store(part + (2 + c) * programs + pid, both[1])


@triton.jit(do_not_specialize=["programs"])
def join_backward(
    q,
    stats,
    j,
    join_stats,
    join_coef,
    dz,
    weight,
    dj,
    part,
    programs,
    A: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient dj at the join's output; sums for the paths' last BatchNorms and the join's weights.

    `part` is (4, CHANNELS, programs): sums of g, of g (q - mean), and of dj times the activation,
    for both of dj's channels.
    """
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    pixel = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < A * D
    at = image * (2 * A * D) + pixel
    d0 = _dj(dz, j, at, valid, join_stats, join_coef)
    d1 = _dj(dz, j, at + A * D, valid, join_stats + 1, join_coef + 1)
    s0 = d0.to(dj.dtype.element_ty)
    s1 = d1.to(dj.dtype.element_ty)
    tl.store(dj + at, s0, mask=valid)
    tl.store(dj + at + A * D, s1, mask=valid)
    d0 = s0.to(tl.float32)
    d1 = s1.to(tl.float32)
    source = q + image * (CHANNELS * A * D) + pixel
    for c in range(CHANNELS):
        v = tl.load(source + c * (A * D), mask=valid, other=0.0).to(tl.float32)
        z = v * tl.load(stats + 2 * CHANNELS + c) + tl.load(stats + 3 * CHANNELS + c)
        g = d0 * tl.load(weight + c) + d1 * tl.load(weight + CHANNELS + c)
        g = tl.where(z > 0, g, SLOPE * g)
        a = leaky(z)
        all4 = tl.reduce((g, g * (v - tl.load(stats + c)), d0 * a, d1 * a), 0, add4)
        for k in tl.static_range(4):
            tl.store(part + (k * CHANNELS + c) * programs + pid, all4[k])


@triton.jit
def _dj(dz, j, at, valid, stats, coef):
    """Gradient at the join's output, zero outside the image; the tables begin at its channel."""
    g = tl.load(dz + at, mask=valid, other=0.0).to(tl.float32)
    q = tl.load(j + at, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, at_input(g, q, stats, coef, 2), 0.0)
