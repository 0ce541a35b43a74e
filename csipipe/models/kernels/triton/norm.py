"""Triton kernels that end what a BatchNorm sums over tiles, in float64, always in the same order.

A BatchNorm's numbers are a table of four rows: mean, 1 / standard deviation, scale and shift. On
the way back a table of two rows, `coef`, turns the gradient g at its output into the one at its
input q: dq = scale (g - coef0 - (q - mean) coef1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from csipipe.models.kernels.triton.window import add2, sums


@triton.jit
def at_input(g, q, stats, coef, C):
    """dq; the tables, of C channels, begin at this one."""
    dq = g - tl.load(coef) - (q - tl.load(stats)) * tl.load(coef + C)
    return dq * tl.load(stats + 2 * C)


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

    Deviations are taken from each tile's mean, and of the tiles' means from the first's, so that
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
        near = tl.load(part + c * all_programs).to(tl.float64)
        first = tl.zeros((CHUNK,), tl.float64)
        second = tl.zeros((CHUNK,), tl.float64)
        start = 0
        while start < programs:
            p = start + tl.arange(0, CHUNK)
            there = p < programs
            n = tl.load(part + 2 * C * all_programs + p, mask=there, other=0.0).to(tl.float64)
            off = tl.load(part + c * all_programs + p, mask=there, other=0.0) - near
            within = tl.load(part + (C + c) * all_programs + p, mask=there, other=0.0)
            first += n * off  # n is 0 where no tile is
            second += within + n * off * off
            start += CHUNK
        total, squares = tl.reduce((first, second), 0, add2)
        off = total / values
        mean = near + off
        squares -= total * off
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
    rows: tl.constexpr = 2 + EXTRA
    for k in tl.static_range(rows):
        none = tl.zeros((CHUNK,), tl.float64)
        all_sums = (all_sums + (none,)) if k else (none,)
    start = 0
    while start < programs:
        p = start + tl.arange(0, CHUNK)
        for k in tl.static_range(rows):
            at = part + (k * C + c) * all_programs + p
            more = all_sums[k] + tl.load(at, mask=p < programs, other=0.0)
            next_sums = (next_sums + (more,)) if k else (more,)
        all_sums = next_sums
        start += CHUNK
    total = sums(all_sums, rows)
    g = total[0]
    gv = total[1]
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
        tl.store(extra + k * C + c, total[2 + k].to(tl.float32))
