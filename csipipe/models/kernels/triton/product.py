"""A linear layer's products in fp32 on a GPU: forward with its bias, and the gradient at its input.

Each float32 factor is split into two of TF32, and three of their four products are added up in
float32 ("3xTF32"). Beside float64 that is 2e-7 away, cuBLAS's fp32 4e-7 to 8e-7, and on an H100
it takes two thirds of the time. Weight gradients, whose sums are over rows, are cuBLAS's.

Shapes: B rows, I inputs and O outputs, U stacked layers; M, N, K of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

_STEP = 32
"""Terms of a sum at a time; the same for all tiles, so that sums have one order."""


@dataclass(frozen=True)
class Tile:
    """What a program computes. Only the speed depends on it."""

    rows: int
    columns: int
    warps: int
    stages: int


TILES = WIDE, SMALL = Tile(64, 128, 4, 3), Tile(64, 64, 4, 4)
"""As measured on an H100: wide ones where sums are long and there are programs enough."""
_LONG, _PROGRAMS = 1024, 200
_GROUP = 8
"""Rows of tiles whose programs run one after the other: what they read stays in the L2 cache."""


@triton.jit
def product(
    a,
    b,
    bias,
    out,
    M,
    N,
    a_u,
    a_m,
    a_k,
    b_u,
    b_n,
    b_k,
    out_u,
    out_m,
    out_n,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of out (U, M, N): a (U, M, K) times b (U, N, K) transposed, any strides."""
    u = tl.program_id(1).to(tl.int64)
    high = tl.cdiv(M, ROWS)
    in_group = GROUP * tl.cdiv(N, COLUMNS)
    first = tl.program_id(0) // in_group * GROUP
    size = min(high - first, GROUP)
    row = (first + tl.program_id(0) % in_group % size).to(tl.int64) * ROWS
    column = (tl.program_id(0) % in_group // size).to(tl.int64) * COLUMNS
    m = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    m_inside = m < M - row
    n_inside = n < N - column
    a_at = a + u * a_u + row * a_m + (m[:, None] * a_m + k[None, :] * a_k)
    b_at = b + u * b_u + column * b_n + (k[:, None] * b_k + n[None, :] * b_n)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, STEP):
        k_inside = k < K - start
        x = tl.load(a_at, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
        y = tl.load(b_at, mask=k_inside[:, None] & n_inside[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision="tf32x3")
        a_at += STEP * a_k
        b_at += STEP * b_k
    if BIAS:
        total += tl.load(bias + u * N + column + n, mask=n_inside, other=0.0)[None, :]
    at = out + u * out_u + row * out_m + column * out_n
    at += m[:, None] * out_m + n[None, :] * out_n
    tl.store(at, total, mask=m_inside[:, None] & n_inside[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """(…, I) by (O, I) and (O) → (…, O); stacked, (U, B, I) by (U, O, I) and (U, O) → (U, B, O)."""
    out = x.new_empty(*x.shape[:-1], weight.shape[-2])
    _multiply(_by_layer(x, weight), _by_layer(weight, weight), _by_layer(out, weight), bias, tile)
    return out


def input_gradient(gradient: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    """(…, O) by (O, I) → (…, I); stacked, (U, B, O) by (U, O, I) → (U, B, I)."""
    out = gradient.new_empty(*gradient.shape[:-1], weight.shape[-1])
    # transposed: tensor cores want a sum's terms side by side in their second factor, where the
    # gradient has them and the weight hasn't; the first one goes through registers
    a, b = _by_layer(weight, weight).mT, _by_layer(gradient, weight)
    _multiply(a, b, _by_layer(out, weight).mT, None, tile)
    return out


def _by_layer(x: Tensor, weight: Tensor) -> Tensor:
    """(U, …, last), where U is 1 unless the weight is of stacked layers."""
    return x.reshape(len(weight) if weight.dim() == 3 else 1, -1, x.shape[-1])


def _multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, tile: Tile | None) -> None:
    """(U, M, K) by (U, N, K) and (U, N) into (U, M, N)."""
    layers, m, n = out.shape
    k = a.shape[-1]
    tile = tile or _tile(layers, m, n, k)
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns), layers)
    product[grid](
        a,
        b,
        a if bias is None else bias.contiguous(),
        out,
        m,
        n,
        *a.stride(),
        *b.stride(),
        *out.stride(),
        K=k,
        BIAS=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=_STEP,
        GROUP=_GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _tile(layers: int, m: int, n: int, k: int) -> Tile:
    programs = layers * triton.cdiv(m, WIDE.rows) * triton.cdiv(n, WIDE.columns)
    return WIDE if k >= _LONG and programs >= _PROGRAMS else SMALL
