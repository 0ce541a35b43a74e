"""Triton kernels of CRBlock's forward pass, and what the backward pass shares with them.

A convolution applies its producer's BatchNorm and LeakyReLU as it loads, so that only the
convolutions' own outputs q are stored, and it hands each tile's sums to the next BatchNorm. Tiles'
sums are added in a second kernel, in float64 and always in the same order: no atomics, the same
bits every time.

One program does one tile (BLOCK pixels) of one image, with all output channels in registers;
neighbours' values come out of the L1 cache. Tensors are (B, channels, A, D), contiguous within an
image; names ending in `_channels` say how many channels the tensor has in memory.

BatchNorm's numbers of a layer are a table of four rows: mean, 1 / standard deviation, scale and
shift, of `stats_channels` entries each.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLOPE = tl.constexpr(0.3)


@triton.jit
def add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def add7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def sums(values, N: tl.constexpr):
    """Sum of each of N tensors, all in one pass over the threads."""
    tl.static_assert((N == 2) | (N == 4) | (N == 7))
    if N == 2:
        return tl.reduce(values, 0, add2)
    elif N == 4:
        return tl.reduce(values, 0, add4)
    else:
        return tl.reduce(values, 0, add7)


@triton.jit
def zeros(N: tl.constexpr, BLOCK: tl.constexpr):
    """N accumulators."""
    out = (tl.zeros((BLOCK,), tl.float32),)
    for _ in tl.static_range(N - 1):
        out = out + (tl.zeros((BLOCK,), tl.float32),)
    return out


@triton.jit
def axpy(acc, value, weight, N: tl.constexpr, STRIDE: tl.constexpr):
    """Add N weights' products with `value` to N accumulators."""
    out = (acc[0] + value * tl.load(weight),)
    for n in tl.static_range(1, N):
        out = out + (acc[n] + value * tl.load(weight + n * STRIDE),)
    return out


@triton.jit
def leaky(z):
    return tl.maximum(z, SLOPE * z)


@triton.jit
def store_sums(first, second, part, pid, programs, N: tl.constexpr):
    """One program's two sums of N channels: `part` is (2, N, programs)."""
    for n in tl.static_range(N):
        tl.store(part + n * programs + pid, first[n])
        tl.store(part + (N + n) * programs + pid, second[n])


@triton.jit
def store_moments(values, valid, count, part, pid, programs, N: tl.constexpr):
    """One tile's mean and sum of squared deviations from it, of N channels."""
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


@triton.jit(do_not_specialize=["programs", "zero"])
def conv_forward(
    x,
    stats,
    weight,
    q,
    part,
    programs,
    zero,  # 0, which the compiler can't know: else it gives a thread neighbouring pixels
    A: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    x_channels: tl.constexpr,
    q_channels: tl.constexpr,
    stats_channels: tl.constexpr,
    ACTIVATE: tl.constexpr,  # x is a convolution's output: apply BatchNorm and LeakyReLU first
    TRAIN: tl.constexpr,  # the statistics are wanted
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Convolution of IN to OUT channels, and the moments of its output."""
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    first = (pid % TILES) * BLOCK
    pixel = first + tl.arange(0, BLOCK)
    valid = pixel < A * D
    h = pixel // D
    d = pixel % D
    source = x + image * (x_channels * A * D) + pixel + zero
    acc = zeros(OUT, BLOCK)
    for i in range(IN):
        if ACTIVATE:
            scale = tl.load(stats + 2 * stats_channels + i)
            shift = tl.load(stats + 3 * stats_channels + i)
        for kh in tl.static_range(KH):
            row = valid & (h >= KH // 2 - kh) & (h < A + KH // 2 - kh)
            for kw in tl.static_range(KW):
                inside = row & (d >= KW // 2 - kw) & (d < D + KW // 2 - kw)
                offset = (kh - KH // 2) * D + kw - KW // 2
                v = tl.load(source + i * (A * D) + offset, mask=inside, other=0.0).to(tl.float32)
                if ACTIVATE:
                    v = tl.where(inside, leaky(v * scale + shift), 0.0)
                acc = axpy(acc, v, weight + i * (KH * KW) + kh * KW + kw, OUT, IN * KH * KW)
    target = q + image * (q_channels * A * D) + pixel + zero
    stored = (acc[0].to(q.dtype.element_ty),)
    for o in tl.static_range(1, OUT):
        stored = stored + (acc[o].to(q.dtype.element_ty),)
    for o in tl.static_range(OUT):
        tl.store(target + o * (A * D), stored[o], mask=valid)
    if TRAIN:
        values = (stored[0].to(tl.float32),)  # of what the next layer sees, rounding included
        for o in tl.static_range(1, OUT):
            values = values + (stored[o].to(tl.float32),)
        count = tl.minimum(BLOCK, A * D - first).to(tl.float32)
        store_moments(values, valid, count, part, pid, programs, OUT)


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
    acc = zeros(2, BLOCK)
    for c in range(CHANNELS):
        v = tl.load(source + c * (A * D), mask=valid, other=0.0).to(tl.float32)
        v = leaky(v * tl.load(stats + 2 * CHANNELS + c) + tl.load(stats + 3 * CHANNELS + c))
        acc = axpy(acc, v, weight + c, 2, CHANNELS)
    target = j + image * (2 * A * D) + pixel
    stored = (acc[0].to(j.dtype.element_ty), acc[1].to(j.dtype.element_ty))
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


@triton.jit(do_not_specialize=["programs", "values"])
def finish_forward(
    part,
    programs,
    gamma,
    beta,
    running_mean,
    running_var,
    batches,
    stats,
    values,
    C: tl.constexpr,
    stats_channels: tl.constexpr,
    MOMENTUM: tl.constexpr,
    EPS: tl.constexpr,
    PIXELS: tl.constexpr,
    TRAIN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The table of one BatchNorm from its tiles' moments, and its running statistics.

    Deviations are taken from each tile's mean, then of the tiles' means from the whole's, so that
    nothing cancels where the mean is large beside the deviation. One program per channel.
    """
    c = tl.program_id(0)
    if TRAIN:
        total = tl.zeros((CHUNK,), tl.float64)
        start = 0
        while start < programs:
            p = start + tl.arange(0, CHUNK)
            n = tl.minimum(BLOCK, PIXELS - (p % TILES) * BLOCK).to(tl.float64)
            total += n * tl.load(part + c * programs + p, mask=p < programs, other=0.0)
            start += CHUNK
        mean = tl.sum(total) / values
        total = tl.zeros((CHUNK,), tl.float64)
        start = 0
        while start < programs:
            p = start + tl.arange(0, CHUNK)
            there = p < programs
            n = tl.minimum(BLOCK, PIXELS - (p % TILES) * BLOCK).to(tl.float64)
            off = tl.load(part + c * programs + p, mask=there, other=0.0) - mean
            within = tl.load(part + (C + c) * programs + p, mask=there, other=0.0)
            total += tl.where(there, within + n * off * off, 0.0)
            start += CHUNK
        squares = tl.sum(total)
        var = squares / values
        kept = (1 - MOMENTUM) * tl.load(running_mean + c)
        tl.store(running_mean + c, (kept + MOMENTUM * mean).to(tl.float32))
        kept = (1 - MOMENTUM) * tl.load(running_var + c)
        tl.store(running_var + c, (kept + MOMENTUM * (squares / (values - 1))).to(tl.float32))
        if c == 0:
            tl.store(batches, tl.load(batches) + 1)
    else:
        mean = tl.load(running_mean + c).to(tl.float64)
        var = tl.load(running_var + c).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + EPS)
    scale = tl.load(gamma + c) * rstd
    tl.store(stats + c, mean.to(tl.float32))
    tl.store(stats + stats_channels + c, rstd.to(tl.float32))
    tl.store(stats + 2 * stats_channels + c, scale.to(tl.float32))
    tl.store(stats + 3 * stats_channels + c, (tl.load(beta + c) - mean * scale).to(tl.float32))
