"""Triton kernels of CRBlock's weight gradients: a product over pixels, (IN·KH·KW) × OUT.

Conventions as in `triton_forward` and `triton_backward`. A program goes over `images` images, a
chunk of pixels at a time, and keeps the whole gradient in registers; a second kernel adds the
programs' parts, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton_forward import SLOPE, leaky


@triton.jit(do_not_specialize=["zero", "images", "batch"])
def conv_weights(
    g,  # with JOIN: dj
    q,
    stats,
    coef,
    join,
    x,  # the convolution's input, ACTIVATE: before BatchNorm and LeakyReLU
    x_stats,
    part,
    images,
    batch,
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
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,  # type of the product's factors
    N: tl.constexpr,  # ≥ IN KH KW, a power of two
    M: tl.constexpr,  # ≥ OUT
    CHUNK: tl.constexpr,
):
    """Part of the weight gradient from this program's images: `part` is (programs, OUT, IN KH KW)."""
    TAPS: tl.constexpr = IN * KH * KW
    n = tl.arange(0, N)
    i = n // (KH * KW)
    dh = (n // KW) % KH - KH // 2
    dw = n % KW - KW // 2
    offset = i * (A * D) + dh * D + dw
    o = tl.arange(0, M)
    there = o < OUT
    mean = tl.load(stats + o, mask=there, other=0.0)[None, :]
    scale = tl.load(stats + 2 * stats_channels + o, mask=there, other=0.0)[None, :]
    coef0 = tl.load(coef + o, mask=there, other=0.0)[None, :]
    coef1 = tl.load(coef + stats_channels + o, mask=there, other=0.0)[None, :]
    if JOIN:
        shift = tl.load(stats + 3 * stats_channels + o, mask=there, other=0.0)[None, :]
        join0 = tl.load(join + o, mask=there, other=0.0)[None, :]
        join1 = tl.load(join + stats_channels + o, mask=there, other=0.0)[None, :]
    if ACTIVATE:
        x_scale = tl.load(x_stats + 2 * IN + i, mask=n < TAPS, other=0.0)[:, None]
        x_shift = tl.load(x_stats + 3 * IN + i, mask=n < TAPS, other=0.0)[:, None]
    acc = tl.zeros((N, M), tl.float32)
    first = tl.program_id(0) * images
    image = first
    end = tl.minimum(first + images, batch)
    while image < end:  # not a range: the interpreter's needs an older numpy
        x_at = x + image.to(tl.int64) * (x_channels * A * D) + zero
        q_at = q + image.to(tl.int64) * (q_channels * A * D) + zero
        g_at = g + image.to(tl.int64) * ((2 if JOIN else OUT) * A * D) + zero
        for start in range(0, A * D, CHUNK):
            pixel = start + tl.arange(0, CHUNK)
            h = (pixel // D)[None, :] + dh[:, None]
            d = (pixel % D)[None, :] + dw[:, None]
            inside = (h >= 0) & (h < A) & (d >= 0) & (d < D) & (n < TAPS)[:, None]
            a = tl.load(x_at + offset[:, None] + pixel[None, :], mask=inside, other=0.0)
            if ACTIVATE:
                z = a.to(tl.float32) * x_scale + x_shift
                a = tl.where(inside, leaky(z), 0.0).to(x.dtype.element_ty)
            valid = (pixel < A * D)[:, None] & there[None, :]
            at = pixel[:, None] + (o * (A * D))[None, :]
            v = tl.load(q_at + at, mask=valid, other=0.0).to(tl.float32)
            if JOIN:
                d0 = tl.load(g_at + pixel, mask=pixel < A * D, other=0.0).to(tl.float32)
                d1 = tl.load(g_at + A * D + pixel, mask=pixel < A * D, other=0.0).to(tl.float32)
                dq = d0[:, None] * join0 + d1[:, None] * join1
                dq = tl.where(v * scale + shift > 0, dq, SLOPE * dq)
            else:
                dq = tl.load(g_at + at, mask=valid, other=0.0).to(tl.float32)
            dq = tl.where(valid, scale * (dq - coef0 - (v - mean) * coef1), 0.0)
            dq = dq.to(x.dtype.element_ty).to(PRODUCT)
            acc = tl.dot(a.to(PRODUCT), dq, acc, input_precision=PRECISION)
        image += 1
    target = part + tl.program_id(0) * (OUT * TAPS) + n[:, None] + (o * TAPS)[None, :]
    tl.store(target, acc, mask=(n < TAPS)[:, None] & there[None, :])


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
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    start = 0
    while start < programs:
        row = start + tl.arange(0, ROWS)
        at = part + row[:, None] * SIZE + column[None, :]
        total += tl.load(at, mask=(row < programs)[:, None] & (column < SIZE)[None, :], other=0.0)
        start += ROWS
    tl.store(out + column, tl.sum(total, axis=0).to(tl.float32), mask=column < SIZE)
