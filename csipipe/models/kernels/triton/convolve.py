"""Triton kernels of a convolution forward and of the gradient at its input.

A convolution applies its producer's BatchNorm and LeakyReLU as it loads, so that only the
convolutions' own outputs q are stored, and it hands each tile's sums to the next BatchNorm. Tiles'
sums are added in a second kernel (`norm`), in float64 and always in the same order: no atomics,
the same bits every time.

One program does one tile (RUNS runs of pixels) of one image, with all output channels in registers;
neighbours' values come out of the L1 cache. Tensors are (B, channels, A, D), contiguous within an
image; names ending in `_channels` say how many channels the tensor has in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton.window import (
    QUAD,
    SLOPE,
    accumulate,
    activated,
    is_inside,
    places,
    read_windows,
    store_run,
    store_run_moments,
    store_sums,
    sums,
    taken,
    unfold,
    window,
    zeros,
)

RUN = tl.constexpr(8)
"""Pixels of a run. So many serve their window better than fewer would: values of 9 taps' windows
are read and normalised twice for each pixel; of runs of four three times."""


@triton.jit(do_not_specialize=["programs", "share"])
def conv_forward(
    x,
    stats,
    weight,
    bias,
    q,
    part,
    programs,
    share,  # so many images after each other share weights
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
    BIAS: tl.constexpr,  # there is one
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
    h, d = places((pid % TILES) * RUNS + tl.arange(0, RUNS), RUN, D, VERTICAL)
    at = x + image * (x_channels * A * D) + (h * D + d)
    weight += image // share * (OUT * IN * KH * KW)
    bias += image // share * OUT
    acc = zeros(OUT * RUN, d.to(tl.float32))
    for i in range(IN):
        for s in tl.static_range(ACROSS):
            v = window(at + i * (A * D), h, d, s - ACROSS // 2, LEFT, RUN, A, D, VERTICAL)
            if ACTIVATE:
                scale = tl.load(stats + 2 * stats_channels + i)
                shift = tl.load(stats + 3 * stats_channels + i)
                v = activated(v, scale, shift, h, d, s - ACROSS // 2, LEFT, RUN, A, D, VERTICAL)
            for k in tl.static_range(LONG):
                at_weight = weight + i * (KH * KW) + (k * KW + s if VERTICAL else s * KW + k)
                acc = accumulate(acc, v, k, at_weight, OUT, IN * KH * KW, RUN)
    target = q + image * (q_channels * A * D) + (h * D + d)
    for n in tl.static_range(OUT * RUN):
        v = acc[n]
        if BIAS:
            v = v + tl.load(bias + n // RUN)
        rounded = v.to(q.dtype.element_ty)
        stored = (stored + (rounded,)) if n else (rounded,)
    for o in tl.static_range(OUT):
        store_run(target + o * (A * D), stored, o * RUN, h, d, RUN, A, D, VERTICAL)
    if TRAIN:  # of what the next layer sees, rounding included
        store_run_moments(stored, h, d, part, pid, programs, OUT, RUN, A, D, VERTICAL)


@triton.jit
def _read_gradients(
    g,
    q,
    h,
    d,
    o,
    LEFT: tl.constexpr,
    ACROSS: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    JOIN: tl.constexpr,
    NORM: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """Windows of channel o of g and q, for all places across.

    `g` and `q` point to the runs' first pixels of their first channels.
    """
    if NORM:
        out = read_windows(q + o * (A * D), h, d, LEFT, RUN, ACROSS, A, D, VERTICAL)
    if not JOIN:  # the join's two channels are the same for all o
        of_g = read_windows(g + o * (A * D), h, d, LEFT, RUN, ACROSS, A, D, VERTICAL)
        out = (of_g + out) if NORM else of_g
    return out


@triton.jit
def _gradients(
    read,
    h,
    d,
    s: tl.constexpr,
    o,
    stats,
    coef,
    join,
    LEFT: tl.constexpr,
    ACROSS: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    stats_channels: tl.constexpr,
    JOIN: tl.constexpr,
    NORM: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """Window of the gradient dq at a convolution's output, channel o; zero outside the image.

    `read` has g (JOIN: both channels of dj), then q.

    With NORM a BatchNorm follows the convolution, whose output is q. Without, dq is g.
    """
    LOADS: tl.constexpr = (
        (RUN + 2 * LEFT) if VERTICAL else (2 * ((LEFT + QUAD - 1) // QUAD) + RUN // QUAD)
    )
    if NORM:
        scale = tl.load(stats + 2 * stats_channels + o)
        coef1 = scale * tl.load(coef + stats_channels + o)
        back = tl.load(stats + o) * coef1 - scale * tl.load(coef + o)
        at_q: tl.constexpr = ((2 if JOIN else 1) * ACROSS + s) * LOADS
        v = unfold(taken(read, at_q, LOADS), LEFT, RUN, VERTICAL)
    d0 = unfold(taken(read, s * LOADS, LOADS), LEFT, RUN, VERTICAL)
    if JOIN:
        shift = tl.load(stats + 3 * stats_channels + o)
        join0 = tl.load(join + o)
        join1 = tl.load(join + stats_channels + o)
        d1 = unfold(taken(read, (ACROSS + s) * LOADS, LOADS), LEFT, RUN, VERTICAL)
    for t in tl.static_range(RUN + 2 * LEFT):
        if JOIN:
            slope = tl.where(v[t] * scale + shift > 0, scale, SLOPE * scale)
            dq = slope * (d0[t] * join0 + d1[t] * join1)
        elif NORM:
            dq = scale * d0[t]
        else:
            dq = d0[t]
        if NORM:  # scale ((dq - coef0) - (q - mean) coef1): means are taken off in one sum
            dq = dq + (back - v[t] * coef1)
            dq = tl.where(is_inside(h, d, t - LEFT, s - ACROSS // 2, A, D, VERTICAL), dq, 0.0)
        out = (out + (dq,)) if t else (dq,)
    return out


@triton.jit(do_not_specialize=["programs", "share", "zero"])
def conv_backward(
    g,  # with JOIN: dj
    q,
    stats,
    coef,
    join,  # with JOIN: the join's weights of these channels
    weight,
    before,  # ACTIVATE: q of the layer before; ADD: what is added to
    before_stats,
    out,
    part,
    programs,
    share,  # so many images after each other share weights
    zero,  # 0, which the compiler can't know
    A: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    q_channels: tl.constexpr,
    stats_channels: tl.constexpr,
    before_channels: tl.constexpr,
    JOIN: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATE: tl.constexpr,
    ADD: tl.constexpr,
    TILES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Gradient at a convolution's input, through the LeakyReLU before it to that layer's g.

    With its BatchNorm's sums; of a path's first convolution the gradient is added to `before`.
    """
    VERTICAL: tl.constexpr = KH >= KW
    LONG: tl.constexpr = KH if VERTICAL else KW
    ACROSS: tl.constexpr = KW if VERTICAL else KH
    LEFT: tl.constexpr = LONG // 2
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    h, d = places((pid % TILES) * RUNS + tl.arange(0, RUNS), RUN, D, VERTICAL)
    q_at = q + image * (q_channels * A * D) + (h * D + d)
    g_at = g + image * ((2 if JOIN else OUT) * A * D) + (h * D + d)
    weight += image // share * (OUT * IN * KH * KW)
    acc = zeros(IN * RUN, d.to(tl.float32))
    ahead = _read_gradients(g_at, q_at, h, d, 0, LEFT, ACROSS, A, D, JOIN, NORM, VERTICAL)
    for o in range(OUT):  # a channel is read while the one before is computed
        now = ahead
        c = o + 1 - (o + 1) // OUT  # the last one again
        ahead = _read_gradients(g_at, q_at, h, d, c, LEFT, ACROSS, A, D, JOIN, NORM, VERTICAL)
        if JOIN:
            at_j = g_at + o * zero  # read for each channel again: registers are scarcer than reads
            j0 = read_windows(at_j, h, d, LEFT, RUN, ACROSS, A, D, VERTICAL)
            now = j0 + read_windows(at_j + A * D, h, d, LEFT, RUN, ACROSS, A, D, VERTICAL) + now
        for s in tl.static_range(ACROSS):
            dq = _gradients(
                now,
                h,
                d,
                s,
                o,
                stats,
                coef,
                join,
                LEFT,
                ACROSS,
                A,
                D,
                stats_channels,
                JOIN,
                NORM,
                VERTICAL,
            )
            for k in tl.static_range(LONG):  # the kernel turned by 180°
                at_weight = (
                    weight
                    + o * (IN * KH * KW)
                    + (KH * KW - 1 - (k * KW + s if VERTICAL else s * KW + k))
                )
                acc = accumulate(acc, dq, k, at_weight, IN, KH * KW, RUN)
    at = image * (before_channels * A * D) + (h * D + d)
    for i in tl.static_range(IN):
        if ACTIVATE or ADD:
            v = window(before + at + i * (A * D), h, d, 0, 0, RUN, A, D, VERTICAL)
        some = tl.zeros_like(d).to(tl.float32)
        some_v = tl.zeros_like(d).to(tl.float32)
        if ACTIVATE:
            mean = tl.load(before_stats + i)
            scale = tl.load(before_stats + 2 * IN + i)
            shift = tl.load(before_stats + 3 * IN + i)
        for r in tl.static_range(RUN):
            if ACTIVATE:
                dx = acc[i * RUN + r]
                dx = tl.where(v[r] * scale + shift > 0, dx, SLOPE * dx)
                dx = dx.to(out.dtype.element_ty)
                inside = is_inside(h, d, r, 0, A, D, VERTICAL)
                there = tl.where(inside, dx.to(tl.float32), 0.0)
                some += there
                some_v += there * (v[r] - mean)
            elif ADD:
                dx = (v[r] + acc[i * RUN + r]).to(out.dtype.element_ty)
            else:
                dx = acc[i * RUN + r].to(out.dtype.element_ty)
            stored = (stored + (dx,)) if r else (dx,)
        store_run(out + at + i * (A * D), stored, 0, h, d, RUN, A, D, VERTICAL)
        first = (first + (some,)) if i else (some,)
        second = (second + (some_v,)) if i else (some_v,)
    if ACTIVATE:
        store_sums(sums(first, IN), sums(second, IN), part, pid, programs, IN)
