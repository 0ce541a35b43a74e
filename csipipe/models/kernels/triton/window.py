"""What the Triton kernels of convolutions share: runs of pixels, windows around them, sums.

A thread computes runs of RUN pixels along the kernel's longer axis: what it reads serves several
of the kernel's taps, and a weight it loads several pixels. Along columns (VERTICAL) neighbouring
threads have neighbouring pixels of a row; along rows a thread reads a quad of pixels at once.

Values of runs are tuples of tensors, one tensor for each place in the run or window.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLOPE = tl.constexpr(0.3)
QUAD = tl.constexpr(4)


@triton.jit
def leaky(z):
    return tl.maximum(z, SLOPE * z)


@triton.jit
def places(n, RUN: tl.constexpr, D: tl.constexpr, VERTICAL: tl.constexpr):
    """Row and column of the first pixel of run n; past the last run the row is outside."""
    if VERTICAL:
        return n // D * RUN, n % D
    else:
        groups: tl.constexpr = (D + RUN - 1) // RUN
        return n // groups, n % groups * RUN


@triton.jit
def is_inside(h, d, along, across, A: tl.constexpr, D: tl.constexpr, VERTICAL: tl.constexpr):
    """Whether the pixel so far from each run's first is in the image."""
    if VERTICAL:
        return (h + along >= 0) & (h + along < A) & (d + across >= 0) & (d + across < D)
    else:
        return (h + across >= 0) & (h + across < A) & (d + along >= 0) & (d + along < D)


@triton.jit
def window(
    at,
    h,
    d,
    across: tl.constexpr,
    LEFT: tl.constexpr,
    RUN: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """LEFT values before each run, the run's, and LEFT behind it; zero outside the image.

    `at` points to the runs' first pixels, `across` moves the window on the other axis.
    """
    return unfold(read_window(at, h, d, across, LEFT, RUN, A, D, VERTICAL), LEFT, RUN, VERTICAL)


@triton.jit
def read_window(
    at,
    h,
    d,
    across: tl.constexpr,
    LEFT: tl.constexpr,
    RUN: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """What `unfold` makes a window of: so many loads."""
    if VERTICAL:
        for t in tl.static_range(RUN + 2 * LEFT):
            inside = is_inside(h, d, t - LEFT, across, A, D, VERTICAL)
            v = tl.load(at + (across + (t - LEFT) * D), mask=inside, other=0.0)
            out = (out + (v,)) if t else (v,)
        return out
    else:
        quads: tl.constexpr = (LEFT + QUAD - 1) // QUAD
        lane = tl.arange(0, QUAD)
        at4 = tl.expand_dims(at, -1) + across * D
        h4 = tl.expand_dims(h, -1) + across
        d4 = tl.expand_dims(d, -1)
        for k in tl.static_range(2 * quads + RUN // QUAD):
            column = d4 + (lane + (k - quads) * QUAD)
            inside = (h4 >= 0) & (h4 < A) & (column >= 0) & (column < D)
            v4 = tl.load(at4 + (lane + (k - quads) * QUAD), mask=inside, other=0.0)
            out = (out + (v4,)) if k else (v4,)
        return out


@triton.jit
def read_windows(
    at,
    h,
    d,
    LEFT: tl.constexpr,
    RUN: tl.constexpr,
    ACROSS: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """What `read_window` reads for each of ACROSS places of the window on the other axis."""
    for s in tl.static_range(ACROSS):
        some = read_window(at, h, d, s - ACROSS // 2, LEFT, RUN, A, D, VERTICAL)
        out = (out + some) if s else some
    return out


@triton.jit
def taken(values, first: tl.constexpr, N: tl.constexpr):
    """N of a tuple's values."""
    for n in tl.static_range(N):
        one = values[first + n]
        out = (out + (one,)) if n else (one,)
    return out


@triton.jit
def unfold(loaded, LEFT: tl.constexpr, RUN: tl.constexpr, VERTICAL: tl.constexpr):
    """The RUN + 2 LEFT values of what `read_window` read, in float32."""
    if VERTICAL:
        for t in tl.static_range(RUN + 2 * LEFT):
            v = loaded[t].to(tl.float32)
            out = (out + (v,)) if t else (v,)
        return out
    else:
        quads: tl.constexpr = (LEFT + QUAD - 1) // QUAD
        for k in tl.static_range(2 * quads + RUN // QUAD):
            some = unpack(loaded[k].to(tl.float32))
            every = (every + some) if k else some
        for t in tl.static_range(RUN + 2 * LEFT):
            v = every[quads * QUAD - LEFT + t]
            out = (out + (v,)) if t else (v,)
        return out


@triton.jit
def unpack(v4):
    """(…, 4) → four tensors (…)."""
    pairs = v4.reshape(v4.shape[:-1] + [2, 2])
    even, odd = tl.split(pairs)
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return (v0, v1, v2, v3)


@triton.jit
def store_run(
    at,
    values,
    first: tl.constexpr,
    h,
    d,
    RUN: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """Write runs, RUN of a tuple's values from `first` on, to where `at` points."""
    if VERTICAL:
        for r in tl.static_range(RUN):
            tl.store(at + r * D, values[first + r], mask=is_inside(h, d, r, 0, A, D, VERTICAL))
    else:
        lane = tl.arange(0, QUAD)
        for r in tl.static_range(0, RUN, QUAD):
            even = tl.join(values[first + r], values[first + r + 2])
            odd = tl.join(values[first + r + 1], values[first + r + 3])
            v4 = tl.join(even, odd).reshape(h.shape + [QUAD])
            inside = (tl.expand_dims(h, -1) < A) & (tl.expand_dims(d, -1) + (lane + r) < D)
            tl.store(tl.expand_dims(at, -1) + (lane + r), v4, mask=inside)


@triton.jit
def activated(
    v,
    scale,
    shift,
    h,
    d,
    across: tl.constexpr,
    LEFT: tl.constexpr,
    RUN: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    VERTICAL: tl.constexpr,
):
    """BatchNorm and LeakyReLU of a window; zero outside the image."""
    for t in tl.static_range(RUN + 2 * LEFT):
        inside = is_inside(h, d, t - LEFT, across, A, D, VERTICAL)
        a = tl.where(inside, leaky(v[t] * scale + shift), 0.0)
        out = (out + (a,)) if t else (a,)
    return out


@triton.jit
def zeros(N: tl.constexpr, like):
    """N accumulators."""
    out = (tl.zeros_like(like),)
    for _ in tl.static_range(N - 1):
        out = out + (tl.zeros_like(like),)
    return out


@triton.jit
def accumulate(
    acc, v, k: tl.constexpr, weight, N: tl.constexpr, STRIDE: tl.constexpr, RUN: tl.constexpr
):
    """To accumulators (N channels, RUN) add the window's values from k on, times N weights."""
    for n in tl.static_range(N):
        w = tl.load(weight + n * STRIDE)
        for r in tl.static_range(RUN):
            new = acc[n * RUN + r] + v[k + r] * w
            out = (out + (new,)) if n + r else (new,)
    return out


@triton.jit
def add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def add7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def sums(values, N: tl.constexpr, AXIS: tl.constexpr = 0):
    """Sum of each of N tensors along an axis, all in one pass over the threads."""
    tl.static_assert((N == 2) | (N == 4) | (N == 7))
    if N == 2:
        return tl.reduce(values, AXIS, add2)
    elif N == 4:
        return tl.reduce(values, AXIS, add4)
    else:
        return tl.reduce(values, AXIS, add7)


@triton.jit
def store_sums(first, second, part, pid, programs, N: tl.constexpr):
    """One program's two sums of N channels: `part` is (2, N, programs)."""
    for n in tl.static_range(N):
        tl.store(part + n * programs + pid, first[n])
        tl.store(part + (N + n) * programs + pid, second[n])


@triton.jit
def store_run_moments(
    values,
    h,
    d,
    part,
    pid,
    programs,
    N: tl.constexpr,
    RUN: tl.constexpr,
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
