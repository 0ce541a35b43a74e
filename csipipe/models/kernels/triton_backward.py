"""Triton kernels of CRBlock's backward pass. Conventions as in `triton_forward`.

g is the gradient at a BatchNorm's output; a BatchNorm's table of two rows, `coef`, turns it into
the gradient at the convolution's output: dq = scale (g - coef0 - (q - mean) coef1). Activations
are recomputed from q. The gradient at the join's input has 14 channels that are two channels'
products with the join's weights, so it is recomputed as well (JOIN).
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton_forward import SLOPE, add4, axpy, leaky, store_sums, sums, zeros


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
        both = tl.reduce((g, g * (v - tl.load(stats + c))), 0, _add2)
        tl.store(part + c * programs + pid, both[0])
        tl.store(part + (2 + c) * programs + pid, both[1])


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


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


@triton.jit(do_not_specialize=["programs", "zero"])
def conv_backward(
    g,  # with JOIN: dj
    q,
    stats,
    coef,
    join,  # with JOIN: the join's weights of these channels
    weight,
    before,  # ACTIVATE: q of the layer before; else what is added to
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
    ACTIVATE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient at a convolution's input, through the LeakyReLU before it to that layer's g.

    With its BatchNorm's sums; of a path's first convolution the gradient is added to `before`.
    """
    pid = tl.program_id(0)
    image = (pid // TILES).to(tl.int64)
    pixel = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < A * D
    h = pixel // D
    d = pixel % D
    q_at = q + image * (q_channels * A * D) + pixel + zero
    g_at = g + image * ((2 if JOIN else OUT) * A * D) + pixel + zero
    acc = zeros(IN, BLOCK)
    for o in range(OUT):
        mean = tl.load(stats + o)
        scale = tl.load(stats + 2 * stats_channels + o)
        coef0 = tl.load(coef + o)
        coef1 = tl.load(coef + stats_channels + o)
        if JOIN:
            shift = tl.load(stats + 3 * stats_channels + o)
            join0 = tl.load(join + o)
            join1 = tl.load(join + stats_channels + o)
        for kh in tl.static_range(KH):
            row = valid & (h >= kh - KH // 2) & (h < A + kh - KH // 2)
            for kw in tl.static_range(KW):
                inside = row & (d >= kw - KW // 2) & (d < D + kw - KW // 2)
                offset = (KH // 2 - kh) * D + KW // 2 - kw
                v = tl.load(q_at + o * (A * D) + offset, mask=inside, other=0.0).to(tl.float32)
                if JOIN:
                    d0 = tl.load(g_at + offset, mask=inside, other=0.0).to(tl.float32)
                    d1 = tl.load(g_at + A * D + offset, mask=inside, other=0.0).to(tl.float32)
                    dq = d0 * join0 + d1 * join1
                    dq = tl.where(v * scale + shift > 0, dq, SLOPE * dq)
                else:
                    dq = tl.load(g_at + o * (A * D) + offset, mask=inside, other=0.0)
                    dq = dq.to(tl.float32)
                dq = tl.where(inside, scale * (dq - coef0 - (v - mean) * coef1), 0.0)
                acc = axpy(acc, dq, weight + o * (IN * KH * KW) + kh * KW + kw, IN, KH * KW)
    at = image * (before_channels * A * D) + pixel + zero
    if ACTIVATE:
        second = acc
        first = acc
        for i in tl.static_range(IN):
            v = tl.load(before + at + i * (A * D), mask=valid, other=0.0).to(tl.float32)
            z = v * tl.load(before_stats + 2 * IN + i) + tl.load(before_stats + 3 * IN + i)
            stored = tl.where(z > 0, acc[i], SLOPE * acc[i]).to(out.dtype.element_ty)
            tl.store(out + at + i * (A * D), stored, mask=valid)
            s = stored.to(tl.float32)
            t = s * (v - tl.load(before_stats + i))
            first = (first + (s,)) if i else (s,)
            second = (second + (t,)) if i else (t,)
        store_sums(sums(first, IN), sums(second, IN), part, pid, programs, IN)
    else:
        for i in tl.static_range(IN):
            v = tl.load(before + at + i * (A * D), mask=valid, other=0.0).to(tl.float32)
            tl.store(out + at + i * (A * D), (v + acc[i]).to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["programs", "values"])
def finish_backward(
    part,
    programs,
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
    g = _total(part + c * programs, programs, CHUNK)
    gv = _total(part + (C + c) * programs, programs, CHUNK)
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
        total = _total(part + ((2 + k) * C + c) * programs, programs, CHUNK)
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
