"""The paper's loss of each row on a GPU with its floor, and its gradient: one pass each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from csipipe.models.kernels.triton.window import add3

_BLOCK = 1024


@triton.jit
def _place(row, rows, apart, beside):
    """Where a row lies among groups of `rows`, from the distances of groups and of rows."""
    return (row // rows) * apart + (row % rows) * beside


@triton.jit
def row_losses(
    h_hat, h, loss, floor, factor, rows, apart, beside, REALS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of row program_id: loss, floor, and what turns a difference into a gradient."""
    row = tl.program_id(0).to(tl.int64)
    originals = h + _place(row, rows, apart, beside)
    off = tl.zeros((BLOCK,), tl.float32)
    centred = tl.zeros((BLOCK,), tl.float32)
    energy = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, REALS, BLOCK):
        real = start + tl.arange(0, BLOCK)
        x = tl.load(h_hat + row * REALS + real, mask=real < REALS, other=0.0).to(tl.float32)
        y = tl.load(originals + real, mask=real < REALS, other=0.0).to(tl.float32)
        c = tl.where(real < REALS, y - 0.5, 0.0)
        off += (x - y) * (x - y)
        centred += c * c
        energy += y * y
    total = tl.reduce((off, centred, energy), 0, add3)
    tl.store(loss + row, total[0] / total[2])
    tl.store(floor + row, total[1] / total[2])
    tl.store(factor + row, 2.0 / total[2])


@triton.jit
def row_gradients(
    h_hat, h, factor, g, out, rows, apart, beside, REALS: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient at row program_id(0) of `h_hat`, from that of its loss."""
    row = tl.program_id(0).to(tl.int64)
    real = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * REALS + real
    x = tl.load(h_hat + at, mask=real < REALS).to(tl.float32)
    originals = h + _place(row, rows, apart, beside)
    y = tl.load(originals + real, mask=real < REALS).to(tl.float32)
    d = (x - y) * (tl.load(factor + row) * tl.load(g + row))
    tl.store(out + at, d.to(out.dtype.element_ty), mask=real < REALS)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_hat, h = h_hat.contiguous(), h if h.dim() == 5 else h[None]
        if not h[0, 0].is_contiguous():
            h = h.contiguous()
        ctx.at = at = h.shape[1], h.stride(0), h.stride(1)
        rows, reals = len(h_hat), h_hat[0].numel()
        assert (rows, reals) == (h.shape[:2].numel(), h.shape[2:].numel()), (h_hat.shape, h.shape)
        loss, floor, factor = (torch.empty(rows, device=h.device) for _ in range(3))
        row_losses[(rows,)](h_hat, h, loss, floor, factor, *at, REALS=reals, BLOCK=_BLOCK)
        ctx.save_for_backward(h_hat, h, factor)
        ctx.mark_non_differentiable(floor)
        return loss, floor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        h_hat, h, factor = ctx.saved_tensors
        out, reals = torch.empty_like(h_hat), h_hat[0].numel()
        grid = (len(h_hat), triton.cdiv(reals, _BLOCK))
        g = gradients[0].contiguous()
        row_gradients[grid](h_hat, h, factor, g, out, *ctx.at, REALS=reals, BLOCK=_BLOCK)
        return out, None


def loss_and_floor(h_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """As `csipipe.measure.metrics.loss_and_floor`, of float32 or bfloat16: (B,) in float32.

    The loss's gradient has no gradient, the floor has none.
    """
    found: tuple[Tensor, Tensor] = _Losses.apply(h_hat, h)  # type: ignore[no-untyped-call]
    return found
