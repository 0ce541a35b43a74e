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

from csipipe.models.kernels.triton_window import (
    RUN,
    accumulate,
    activated,
    is_inside,
    leaky,
    places,
    store_run,
    store_sums,
    sums,
    window,
    zeros,
)


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


@triton.jit(do_not_specialize=["programs", "share", "zero"])
def conv_forward(
    x,
    stats,
    weight,
    bias,
    q,
    part,
    programs,
    share,  # so many images after each other share weights
    zero,  # 0, which the compiler can't know: else it gives a thread neighbouring runs
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
    FINISH: tl.constexpr,  # add the bias and apply LeakyReLU: no BatchNorm follows
    TRAIN: tl.constexpr,  # the statistics are wanted
    TILES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Convolution of IN to OUT channels, and the moments of its output."""
    VERTICAL: tl.constexpr = KH >= KW
    LONG: tl.constexpr = KH if VERTICAL else KW
    ACROSS: tl.constexpr = KW if VERTICAL else KH
    LEFT: tl.constexpr = LONG // 2
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    h, d = places((pid % TILES) * RUNS + tl.arange(0, RUNS), D, VERTICAL)
    source = x + image * (x_channels * A * D)
    if VERTICAL and ACROSS > 1:
        source = source + zero
    at = source + (h * D + d)
    weight += image // share * (OUT * IN * KH * KW)
    bias += image // share * OUT
    acc = zeros(OUT * RUN, d.to(tl.float32))
    for i in range(IN):
        for s in tl.static_range(ACROSS):
            v = window(at + i * (A * D), h, d, s - ACROSS // 2, LEFT, A, D, VERTICAL)
            if ACTIVATE:
                scale = tl.load(stats + 2 * stats_channels + i)
                shift = tl.load(stats + 3 * stats_channels + i)
                v = activated(v, scale, shift, h, d, s - ACROSS // 2, LEFT, A, D, VERTICAL)
            for k in tl.static_range(LONG):
                at_weight = weight + i * (KH * KW) + (k * KW + s if VERTICAL else s * KW + k)
                acc = accumulate(acc, v, k, at_weight, OUT, IN * KH * KW)
    target = q + image * (q_channels * A * D) + (h * D + d)
    for n in tl.static_range(OUT * RUN):
        v = acc[n]
        if FINISH:
            v = leaky(v + tl.load(bias + n // RUN))
        rounded = v.to(q.dtype.element_ty)
        stored = (stored + (rounded,)) if n else (rounded,)
    for o in tl.static_range(OUT):
        store_run(
            target + o * (A * D),
            stored[o * RUN],
            stored[o * RUN + 1],
            stored[o * RUN + 2],
            stored[o * RUN + 3],
            h,
            d,
            A,
            D,
            VERTICAL,
        )
    if TRAIN:  # of what the next layer sees, rounding included
        _store_run_moments(stored, h, d, part, pid, programs, OUT, A, D, VERTICAL)


@triton.jit
def _store_run_moments(
    values,
    h,
    d,
    part,
    pid,
    programs,
    N: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """One tile's mean and sum of squared deviations from it, of N channels, and its pixels."""
    pixels = tl.zeros_like(d)
    for r in tl.static_range(RUN):
        pixels += is_inside(h, d, r, 0, A, D, VERTICAL).to(tl.int32)
    count = tl.sum(pixels, 0).to(tl.float32)
    tl.store(part + 2 * N * programs + pid, count)
    for n in tl.static_range(N):
        some = tl.zeros_like(d).to(tl.float32)
        for r in tl.static_range(RUN):
            v = values[n * RUN + r].to(tl.float32)
            some += tl.where(is_inside(h, d, r, 0, A, D, VERTICAL), v, 0.0)
        totals = (totals + (some,)) if n else (some,)
    total = sums(totals, N)
    for n in tl.static_range(N):
        mean = total[n] / count
        means = (means + (mean,)) if n else (mean,)
        some = tl.zeros_like(d).to(tl.float32)
        for r in tl.static_range(RUN):
            off = values[n * RUN + r].to(tl.float32) - mean
            some += tl.where(is_inside(h, d, r, 0, A, D, VERTICAL), off * off, 0.0)
        squares = (squares + (some,)) if n else (some,)
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


@triton.jit(do_not_specialize=["programs", "all_programs", "values"])
def finish_forward(
    part,
    programs,
    all_programs,
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
    TRAIN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The table of one BatchNorm from its tiles' moments, and its running statistics.

    Deviations are taken from each tile's mean, then of the tiles' means from the whole's, so that
    nothing cancels where the mean is large beside the deviation. One program per channel and
    group: parameters and tables of groups lie after each other, so do their programs' parts.
    """
    c = tl.program_id(0)
    group = tl.program_id(1)
    part += group * programs
    stats += group * (4 * C)
    gamma += group * C
    beta += group * C
    running_mean += group * C
    running_var += group * C
    if TRAIN:
        total = tl.zeros((CHUNK,), tl.float64)
        start = 0
        while start < programs:
            p = start + tl.arange(0, CHUNK)
            there = p < programs
            n = tl.load(part + 2 * C * all_programs + p, mask=there, other=0.0).to(tl.float64)
            total += n * tl.load(part + c * all_programs + p, mask=there, other=0.0)
            start += CHUNK
        mean = tl.sum(total) / values
        total = tl.zeros((CHUNK,), tl.float64)
        start = 0
        while start < programs:
            p = start + tl.arange(0, CHUNK)
            there = p < programs
            n = tl.load(part + 2 * C * all_programs + p, mask=there, other=0.0).to(tl.float64)
            off = tl.load(part + c * all_programs + p, mask=there, other=0.0) - mean
            within = tl.load(part + (C + c) * all_programs + p, mask=there, other=0.0)
            total += tl.where(there, within + n * off * off, 0.0)
            start += CHUNK
        squares = tl.sum(total)
        var = squares / values
        kept = (1 - MOMENTUM) * tl.load(running_mean + c)
        tl.store(running_mean + c, (kept + MOMENTUM * mean).to(tl.float32))
        kept = (1 - MOMENTUM) * tl.load(running_var + c)
        tl.store(running_var + c, (kept + MOMENTUM * (squares / (values - 1))).to(tl.float32))
        if c == 0:
            tl.store(batches + group, tl.load(batches + group) + 1)
    else:
        mean = tl.load(running_mean + c).to(tl.float64)
        var = tl.load(running_var + c).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + EPS)
    scale = tl.load(gamma + c) * rstd
    tl.store(stats + c, mean.to(tl.float32))
    tl.store(stats + stats_channels + c, rstd.to(tl.float32))
    tl.store(stats + 2 * stats_channels + c, scale.to(tl.float32))
    tl.store(stats + 3 * stats_channels + c, (tl.load(beta + c) - mean * scale).to(tl.float32))
