"""Triton kernels of CRBlock's backward pass. Conventions as in `triton_forward`.

g is the gradient at a BatchNorm's output; a BatchNorm's table of two rows, `coef`, turns it into
the gradient at the convolution's output: dq = scale (g - coef0 - (q - mean) coef1). Activations
are recomputed from q. The gradient at the join's input has 14 channels that are two channels'
products with the join's weights, so it is recomputed as well (JOIN).
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton_window import (
    RUN,
    SLOPE,
    accumulate,
    add2,
    add4,
    is_inside,
    leaky,
    places,
    store_run,
    store_sums,
    sums,
    window,
    zeros,
)


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
    d0 = _dq(dz, j, at, valid, join_stats, join_coef, 0, 2, 2)
    d1 = _dq(dz, j, at + A * D, valid, join_stats, join_coef, 1, 2, 2)
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
def _dq(
    g,
    q,
    at,
    inside,
    stats,
    coef,
    c,
    stats_channels: tl.constexpr,
    coef_channels: tl.constexpr,
):
    """Gradient at a convolution's output, zero outside the image."""
    v = tl.load(q + at, mask=inside, other=0.0).to(tl.float32) - tl.load(stats + c)
    d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) - tl.load(coef + c)
    d = (d - v * tl.load(coef + coef_channels + c)) * tl.load(stats + 2 * stats_channels + c)
    return tl.where(inside, d, 0.0)


@triton.jit
def gradients(
    g,
    q,
    h,
    d,
    across: tl.constexpr,
    o,
    stats,
    coef,
    join,
    LEFT: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    stats_channels: tl.constexpr,
    JOIN: tl.constexpr,
    NORM: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """Window of the gradient dq at a convolution's output, channel o; zero outside the image.

    Without NORM `g` is the gradient behind a LeakyReLU and `q` what came out of it.

    `g` points to the runs' first pixels of the channel (JOIN: of dj's first), so does `q`.
    """
    if NORM:
        mean = tl.load(stats + o)
        scale = tl.load(stats + 2 * stats_channels + o)
        coef0 = tl.load(coef + o)
        coef1 = scale * tl.load(coef + stats_channels + o)
    v = window(q, h, d, across, LEFT, A, D, VERTICAL)
    if JOIN:
        shift = tl.load(stats + 3 * stats_channels + o)
        join0 = tl.load(join + o)
        join1 = tl.load(join + stats_channels + o)
        d0 = window(g, h, d, across, LEFT, A, D, VERTICAL)
        d1 = window(g + A * D, h, d, across, LEFT, A, D, VERTICAL)
    else:
        d0 = window(g, h, d, across, LEFT, A, D, VERTICAL)
    for t in tl.static_range(RUN + 2 * LEFT):
        if JOIN:
            dq = d0[t] * join0 + d1[t] * join1
            dq = tl.where(v[t] * scale + shift > 0, dq, SLOPE * dq)
        else:
            dq = d0[t]
        if NORM:
            dq = scale * (dq - coef0) - (v[t] - mean) * coef1
            dq = tl.where(is_inside(h, d, t - LEFT, across, A, D, VERTICAL), dq, 0.0)
        else:
            dq = tl.where(v[t] > 0, dq, SLOPE * dq)  # g is zero outside
        out = (out + (dq,)) if t else (dq,)
    return out


@triton.jit(do_not_specialize=["programs", "zero"])
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
    zero,
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
    h, d = places((pid % TILES) * RUNS + tl.arange(0, RUNS), D, VERTICAL)
    q_at = q + image * (q_channels * A * D)
    g_at = g + image * ((2 if JOIN else OUT) * A * D)
    if VERTICAL and ACROSS > 1:
        q_at = q_at + zero
        g_at = g_at + zero
    q_at = q_at + (h * D + d)
    g_at = g_at + (h * D + d)
    acc = zeros(IN * RUN, d.to(tl.float32))
    for o in range(OUT):
        for s in tl.static_range(ACROSS):
            dq = gradients(
                g_at if JOIN else g_at + o * (A * D),
                q_at + o * (A * D),
                h,
                d,
                s - ACROSS // 2,
                o,
                stats,
                coef,
                join,
                LEFT,
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
                acc = accumulate(acc, dq, k, at_weight, IN, KH * KW)
    at = image * (before_channels * A * D) + (h * D + d)
    for i in tl.static_range(IN):
        if ACTIVATE or ADD:
            v = window(before + at + i * (A * D), h, d, 0, 0, A, D, VERTICAL)
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
        store_run(
            out + at + i * (A * D),
            stored[0],
            stored[1],
            stored[2],
            stored[3],
            h,
            d,
            A,
            D,
            VERTICAL,
        )
        first = (first + (some,)) if i else (some,)
        second = (second + (some_v,)) if i else (some_v,)
    if ACTIVATE:
        store_sums(sums(first, IN), sums(second, IN), part, pid, programs, IN)


@triton.jit(do_not_specialize=["programs", "all_programs", "values"])
def finish_backward(
    part,
    programs,
    all_programs,
    stats,
    coef,
    dgamma,
    dbeta,
    extra,  # sums of the further rows of `part`
    values,
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    TRAIN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A BatchNorm's parameters' gradients and coefficients from its tiles' sums."""
    c = tl.program_id(0)
    group = tl.program_id(1)
    part += group * programs
    stats += group * (4 * C)
    coef += group * (2 * C)
    dgamma += group * C
    dbeta += group * C
    g = _total(part + c * all_programs, programs, CHUNK)
    gv = _total(part + (C + c) * all_programs, programs, CHUNK)
    rstd = tl.load(stats + C + c)
    tl.store(dbeta + c, g.to(tl.float32))
    tl.store(dgamma + c, (gv * rstd).to(tl.float32))
    if TRAIN:
        tl.store(coef + c, (g / values).to(tl.float32))
        tl.store(coef + C + c, (gv * rstd * rstd / values).to(tl.float32))
    else:  # the running statistics don't depend on the input
        tl.store(coef + c, 0.0)
        tl.store(coef + C + c, 0.0)
    for k in tl.static_range(EXTRA):
        total = _total(part + ((2 + k) * C + c) * all_programs, programs, CHUNK)
        tl.store(extra + k * C + c, total.to(tl.float32))


@triton.jit
def _total(row, programs, CHUNK: tl.constexpr):
    total = tl.zeros((CHUNK,), tl.float64)
    start = 0
    while start < programs:
        p = start + tl.arange(0, CHUNK)
        total += tl.load(row + p, mask=p < programs, other=0.0)
        start += CHUNK
    return tl.sum(total)


@triton.jit(do_not_specialize=["share", "programs"])
def activate(
    q,
    stats,
    g,  # BACKWARD: gradient behind the LeakyReLU
    out,
    part,
    programs,
    share,
    A: tl.constexpr,
    D: tl.constexpr,
    BACKWARD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BatchNorm and LeakyReLU of two channels, tables shared by `share` images, or the way back:
    the gradient before the LeakyReLU, and the BatchNorm's sums."""
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    stats += image // share * 8
    pixel = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < A * D
    for c in tl.static_range(2):
        at = image * (2 * A * D) + c * (A * D) + pixel
        v = tl.load(q + at, mask=valid, other=0.0).to(tl.float32)
        z = v * tl.load(stats + 4 + c) + tl.load(stats + 6 + c)
        if BACKWARD:
            s = tl.load(g + at, mask=valid, other=0.0).to(tl.float32)
            stored = tl.where(z > 0, s, SLOPE * s).to(out.dtype.element_ty)
            s = stored.to(tl.float32)
            both = tl.reduce((s, s * (v - tl.load(stats + c))), 0, add2)
            tl.store(part + c * programs + pid, both[0])
            tl.store(part + (2 + c) * programs + pid, both[1])
        else:
            stored = leaky(z).to(out.dtype.element_ty)
        tl.store(out + at, stored, mask=valid)
