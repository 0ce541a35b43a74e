"""Triton kernels of CRBlock's weight gradients.

Conventions as in `triton.window` and `triton.convolve`. Threads are a table: a row for each input
channel, a column for each of some runs of pixels. A thread goes over the images of its program
and keeps the sums of its runs for all taps and output channels in registers, in fp32; the sums
over threads come last, and a second kernel adds the programs' parts, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton.convolve import gradients
from csipipe.models.kernels.triton.window import RUN, activated, places, window, zeros


@triton.jit
def _correlate(
    acc, dq, v, k: tl.constexpr, first: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr
):
    """To accumulators first … first+OUT of N add the runs' products with the window from k on."""
    for n in tl.static_range(N):
        new = acc[n]
        if n >= first and n < first + OUT:
            for r in tl.static_range(RUN):
                new += dq[(n - first) * RUN + r] * v[k + r]
        out = (out + (new,)) if n else (new,)
    return out


@triton.jit(do_not_specialize=["zero", "programs", "share"])
def conv_weights(
    g,  # with JOIN: dj
    q,
    stats,
    coef,
    join,
    x,  # the convolution's input, ACTIVATE: before BatchNorm and LeakyReLU
    x_stats,
    part,
    programs,
    share,
    zero,
    A: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    q_channels: tl.constexpr,
    stats_channels: tl.constexpr,
    x_channels: tl.constexpr,
    JOIN: tl.constexpr,
    NORM: tl.constexpr,
    LEAKY: tl.constexpr,
    ACTIVATE: tl.constexpr,
    BIAS: tl.constexpr,  # the gradient of a bias as well, behind the weights'
    ROWS: tl.constexpr,  # of the table, ≥ IN
    COLUMNS: tl.constexpr,
):
    """Part of the weight gradient from this program's images: (programs, OUT, IN KH KW).

    `programs` go over the `share` images that share weights; those of further weights follow.
    """
    VERTICAL: tl.constexpr = KH >= KW
    LONG: tl.constexpr = KH if VERTICAL else KW
    ACROSS: tl.constexpr = KW if VERTICAL else KH
    LEFT: tl.constexpr = LONG // 2
    ALL: tl.constexpr = ((A + RUN - 1) // RUN * D) if VERTICAL else ((D + RUN - 1) // RUN * A)
    TAPS: tl.constexpr = KH * KW
    row = tl.arange(0, ROWS)
    i = tl.minimum(row, IN - 1)[:, None]
    column = tl.arange(0, COLUMNS)[None, :] + tl.zeros((ROWS, COLUMNS), tl.int32)
    acc = zeros(OUT * TAPS, column.to(tl.float32))
    of_bias = zeros(OUT, column.to(tl.float32))
    if ACTIVATE:
        scale = tl.load(x_stats + 2 * IN + i)
        shift = tl.load(x_stats + 3 * IN + i)
    group = tl.program_id(0) // programs
    stats += group * (4 * stats_channels)
    coef += group * (2 * stats_channels)
    image = group * share + tl.program_id(0) % programs
    while image < (group + 1) * share:  # not a range: the interpreter's needs an older numpy
        x_at = x + image.to(tl.int64) * (x_channels * A * D)
        q_at = q + image.to(tl.int64) * (q_channels * A * D)
        g_at = g + image.to(tl.int64) * ((2 if JOIN else OUT) * A * D)
        if VERTICAL and ACROSS > 1:
            x_at = x_at + zero
            q_at = q_at + zero
            g_at = g_at + zero
        for start in range(0, ALL, COLUMNS):
            h, d = places(start + column, D, VERTICAL)
            pixel = h * D + d
            for o in tl.static_range(OUT):
                some = gradients(
                    g_at + pixel if JOIN else g_at + (pixel + o * (A * D)),
                    q_at + (pixel + o * (A * D)),
                    h,
                    d,
                    0,
                    o,
                    stats,
                    coef,
                    join,
                    0,
                    A,
                    D,
                    stats_channels,
                    JOIN,
                    NORM,
                    LEAKY,
                    VERTICAL,
                )
                dq = (dq + some) if o else some
                if BIAS:
                    total = of_bias[o] + (some[0] + some[1] + some[2] + some[3])
                    totals = (totals + (total,)) if o else (total,)
            if BIAS:
                of_bias = totals
            for s in tl.static_range(ACROSS):
                v = window(
                    x_at + (pixel + i * (A * D)), h, d, s - ACROSS // 2, LEFT, A, D, VERTICAL
                )
                if ACTIVATE:
                    v = activated(v, scale, shift, h, d, s - ACROSS // 2, LEFT, A, D, VERTICAL)
                for k in tl.static_range(LONG):
                    acc = _correlate(
                        acc,
                        dq,
                        v,
                        k,
                        (k * KW + s if VERTICAL else s * KW + k) * OUT,
                        OUT,
                        OUT * TAPS,
                    )
        image += programs
    SIZE: tl.constexpr = OUT * IN * TAPS + (OUT if BIAS else 0)
    target = part + tl.program_id(0) * SIZE + row * TAPS
    for tap in tl.static_range(TAPS):
        for o in tl.static_range(OUT):
            total = tl.sum(acc[tap * OUT + o], axis=1)
            tl.store(target + o * (IN * TAPS) + tap, total, mask=row < IN)
    if BIAS:  # every row has the same
        last = part + tl.program_id(0) * SIZE + OUT * IN * TAPS + tl.zeros_like(row)
        for o in tl.static_range(OUT):
            tl.store(last + o, tl.sum(of_bias[o], axis=1), mask=row == 0)


@triton.jit(do_not_specialize=["programs"])
def finish_weights(
    part,
    programs,
    out,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum of the programs' parts: (programs, SIZE) → (SIZE)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part += tl.program_id(1) * programs * SIZE
    out += tl.program_id(1) * SIZE
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    start = 0
    while start < programs:
        row = start + tl.arange(0, ROWS)
        at = part + row[:, None] * SIZE + column[None, :]
        total += tl.load(at, mask=(row < programs)[:, None] & (column < SIZE)[None, :], other=0.0)
        start += ROWS
    tl.store(out + column, tl.sum(total, axis=0).to(tl.float32), mask=column < SIZE)
