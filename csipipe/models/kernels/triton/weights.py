"""Triton kernels of CRBlock's weight gradients.

Conventions as in `triton.window` and `triton.convolve`. Threads are a table: a row for each input
channel, a column for each run of a chunk of an image. A thread goes over the chunks of its program
and keeps the sums of its runs for all taps and output channels in registers, in fp32; the sums
over threads come last, and a second kernel adds the programs' parts, always in the same order.

The gradient dq at the convolution's output is the same for all rows: all threads together compute
it, each a few of a chunk's values, and pass it on through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton.window import (
    QUAD,
    SLOPE,
    activated,
    places,
    read_windows,
    taken,
    unfold,
    zeros,
)

RUN = QUAD
"""Pixels of a run. Not more: sums for all taps and channels leave few registers for them."""


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


@triton.jit
def _halves(v):
    """(…, 2n) → two tensors (…, n), or (…) of n = 1."""
    if v.shape[-1] == 2:
        return tl.split(v)
    else:
        return tl.split(v.reshape(v.shape[:-1] + [v.shape[-1] // 2, 2]))


@triton.jit
def _spread(v, N: tl.constexpr, LEVELS: tl.constexpr):
    """(…, N) → N tensors (…), N = 2^LEVELS ≤ 32."""
    every = (v,)
    for level in tl.static_range(LEVELS):
        for n in tl.static_range(1 << level):
            two = _halves(every[n])
            more = (more + two) if n else two
        every = more
    for n in tl.static_range(N):  # halves of halves lie in the order of the reversed bits
        one = every[
            (n % 2 * 16 + n // 2 % 2 * 8 + n // 4 % 2 * 4 + n // 8 % 2 * 2 + n // 16) // (32 // N)
        ]
        out = (out + (one,)) if n else (one,)
    return out


@triton.jit
def _columns(n, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    """The runs of chunk n. Unsigned, so that the compiler knows that they aren't negative."""
    return (n.to(tl.uint32) % CHUNKS).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _read(
    g,
    q,
    x,
    n,
    i,
    o,
    zero,
    A: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    OUT: tl.constexpr,
    q_channels: tl.constexpr,
    x_channels: tl.constexpr,
    JOIN: tl.constexpr,
    NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of chunk n: g (JOIN: both channels of dj), then q, each (1, COLUMNS, RUN, channels of o),
    then what `read_windows` reads of channels i of x."""
    VERTICAL: tl.constexpr = KH >= KW
    LEFT: tl.constexpr = KH // 2 if VERTICAL else KW // 2
    ACROSS: tl.constexpr = KW if VERTICAL else KH
    image = (n.to(tl.uint32) // CHUNKS).to(tl.int64)
    column = _columns(n, COLUMNS, CHUNKS)
    h, d = places(column[None, :, None, None], RUN, D, VERTICAL)
    inside = is_in_run(h, d, A, D, VERTICAL) & (o >= 0)  # so that it has all of the table's axes
    r = tl.arange(0, RUN)[None, None, :, None]
    pixel = h * D + d + (r * D if VERTICAL else r)
    if JOIN:
        at = g + image * (2 * A * D) + (pixel + o * 0)
        out = (tl.load(at, mask=inside, other=0.0),)
        out = out + (tl.load(at + A * D, mask=inside, other=0.0),)
    else:
        at = g + image * (OUT * A * D) + (pixel + o * (A * D))
        out = (tl.load(at, mask=inside, other=0.0),)
    if NORM:
        at = q + image * (q_channels * A * D) + (pixel + o * (A * D))
        out = out + (tl.load(at, mask=inside, other=0.0),)
    h, d = places(column[None, :] + i * 0, RUN, D, VERTICAL)
    x_at = x + image * (x_channels * A * D)
    if VERTICAL and ACROSS > 1:
        x_at = x_at + zero
    x_at = x_at + (h * D + d + i * (A * D))
    return out + read_windows(x_at, h, d, LEFT, RUN, ACROSS, A, D, VERTICAL)


@triton.jit
def is_in_run(h, d, A: tl.constexpr, D: tl.constexpr, VERTICAL: tl.constexpr):
    """Whether the pixels of runs (…, 1, 1) are in the image: (…, RUN, 1)."""
    r = tl.arange(0, RUN)[None, None, :, None]
    if VERTICAL:
        return h + r < A
    else:
        return (h < A) & (d + r < D)


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
    zero,  # 0, which the compiler can't know: else it gives a thread neighbouring runs
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
    ACTIVATE: tl.constexpr,
    BIAS: tl.constexpr,  # the gradient of a bias as well, behind the weights'
    ROWS: tl.constexpr,  # of the table, ≥ IN
    COLUMNS: tl.constexpr,
    OUTS: tl.constexpr,  # ≥ OUT
    LEVELS: tl.constexpr,  # RUN OUTS = 2^LEVELS
    AHEAD: tl.constexpr,  # read a chunk while the one before is computed
):
    """Part of the weight gradient from this program's chunks: (programs, OUT, IN KH KW).

    `programs` share the `share` images that share weights; those of further weights follow.
    """
    VERTICAL: tl.constexpr = KH >= KW
    LONG: tl.constexpr = KH if VERTICAL else KW
    ACROSS: tl.constexpr = KW if VERTICAL else KH
    LEFT: tl.constexpr = LONG // 2
    ALL: tl.constexpr = ((A + RUN - 1) // RUN * D) if VERTICAL else ((D + RUN - 1) // RUN * A)
    CHUNKS: tl.constexpr = (ALL + COLUMNS - 1) // COLUMNS
    WHOLE: tl.constexpr = A // RUN * RUN == A if VERTICAL else D // RUN * RUN == D
    EXACT: tl.constexpr = WHOLE and CHUNKS * COLUMNS == ALL  # no run is partly outside the image
    LOADS: tl.constexpr = (RUN + 2 * LEFT) if VERTICAL else (2 * ((LEFT + RUN - 1) // RUN) + 1)
    GRADIENTS: tl.constexpr = (2 if JOIN else 1) + (1 if NORM else 0)
    TAPS: tl.constexpr = KH * KW
    row = tl.arange(0, ROWS)
    i = tl.minimum(row, IN - 1)[:, None]
    o = tl.minimum(tl.arange(0, OUTS), OUT - 1)[None, None, None, :]
    acc = zeros(OUT * TAPS, tl.zeros((ROWS, COLUMNS), tl.float32))
    of_bias = zeros(OUT, tl.zeros((ROWS, COLUMNS), tl.float32))
    if ACTIVATE:
        x_scale = tl.load(x_stats + 2 * IN + i)
        x_shift = tl.load(x_stats + 3 * IN + i)
    group = tl.program_id(0) // programs
    stats += group * (4 * stats_channels)
    coef += group * (2 * stats_channels)
    if NORM:
        mean = tl.load(stats + o)
        scale = tl.load(stats + 2 * stats_channels + o)
        coef0 = tl.load(coef + o)
        coef1 = scale * tl.load(coef + stats_channels + o)
    if JOIN:
        shift = tl.load(stats + 3 * stats_channels + o)
        join0 = tl.load(join + o)
        join1 = tl.load(join + stats_channels + o)
    chunks = share * CHUNKS
    number = (tl.program_id(0) % programs).to(tl.int64)
    n = group * chunks + (chunks * number // programs).to(tl.int32)
    end = group * chunks + (chunks * (number + 1) // programs).to(tl.int32)
    last = end - 1
    if AHEAD:
        read = _read(
            g,
            q,
            x,
            n,
            i,
            o,
            zero,
            A,
            D,
            KH,
            KW,
            OUT,
            q_channels,
            x_channels,
            JOIN,
            NORM,
            COLUMNS,
            CHUNKS,
        )
    while n < end:  # not a range: the interpreter's needs an older numpy
        some = _read(
            g,
            q,
            x,
            tl.minimum(n + 1, last) if AHEAD else n,
            i,
            o,
            zero,
            A,
            D,
            KH,
            KW,
            OUT,
            q_channels,
            x_channels,
            JOIN,
            NORM,
            COLUMNS,
            CHUNKS,
        )
        if AHEAD:
            now = read
            read = some
        else:
            now = some
        column = _columns(n, COLUMNS, CHUNKS)
        dq = now[0].to(tl.float32)
        if NORM:
            v = now[GRADIENTS - 1].to(tl.float32)
        if JOIN:
            dq = dq * join0 + now[1].to(tl.float32) * join1
            dq = tl.where(v * scale + shift > 0, dq, SLOPE * dq)
        if NORM:
            dq = scale * (dq - coef0) - (v - mean) * coef1
            if not EXACT:
                h, d = places(column[None, :, None, None], RUN, D, VERTICAL)
                dq = tl.where(is_in_run(h, d, A, D, VERTICAL), dq, 0.0)
        # the channels' axis, which lies over threads, is spread first: one pass through memory
        wide = tl.broadcast_to(dq.reshape((1, COLUMNS, RUN * OUTS)), (ROWS, COLUMNS, RUN * OUTS))
        spread = _spread(wide, RUN * OUTS, LEVELS)
        for k in tl.static_range(OUT):
            for r in tl.static_range(RUN):
                one = spread[r * OUTS + k]
                dqs = (dqs + (one,)) if k + r else (one,)
        if BIAS:
            for k in tl.static_range(OUT):
                total = of_bias[k] + (
                    dqs[k * RUN] + dqs[k * RUN + 1] + dqs[k * RUN + 2] + dqs[k * RUN + 3]
                )
                totals = (totals + (total,)) if k else (total,)
            of_bias = totals
        h, d = places(column[None, :] + i * 0, RUN, D, VERTICAL)
        for s in tl.static_range(ACROSS):
            w = unfold(taken(now, GRADIENTS + s * LOADS, LOADS), LEFT, RUN, VERTICAL)
            if ACTIVATE:
                w = activated(w, x_scale, x_shift, h, d, s - ACROSS // 2, LEFT, RUN, A, D, VERTICAL)
            for k in tl.static_range(LONG):
                acc = _correlate(
                    acc,
                    dqs,
                    w,
                    k,
                    (k * KW + s if VERTICAL else s * KW + k) * OUT,
                    OUT,
                    OUT * TAPS,
                )
        n += 1
    SIZE: tl.constexpr = OUT * IN * TAPS + (OUT if BIAS else 0)
    target = part + tl.program_id(0) * SIZE + row * TAPS
    for tap in tl.static_range(TAPS):
        for k in tl.static_range(OUT):
            total = tl.sum(acc[tap * OUT + k], axis=1)
            tl.store(target + k * (IN * TAPS) + tap, total, mask=row < IN)
    if BIAS:  # every row has the same
        last_part = part + tl.program_id(0) * SIZE + OUT * IN * TAPS + tl.zeros_like(row)
        for k in tl.static_range(OUT):
            tl.store(last_part + k, tl.sum(of_bias[k], axis=1), mask=row == 0)


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
