"""The paper's loss of each row on a GPU, and its gradient: one pass over the images each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from csipipe.models.kernels.triton.window import add2

_BLOCK = 1024


@triton.jit
def row_losses(h_hat, h, loss, factor, REALS: tl.constexpr, BLOCK: tl.constexpr):
    """Of row program_id: the loss, and what turns a difference into a gradient."""
    row = tl.program_id(0).to(tl.int64)
    off = tl.zeros((BLOCK,), tl.float32)
    energy = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, REALS, BLOCK):
        real = start + tl.arange(0, BLOCK)
        at = row * REALS + real
        x = tl.load(h_hat + at, mask=real < REALS, other=0.0).to(tl.float32)
        y = tl.load(h + at, mask=real < REALS, other=0.0).to(tl.float32)
        off += (x - y) * (x - y)
        energy += y * y
    total = tl.reduce((off, energy), 0, add2)
    tl.store(loss + row, total[0] / total[1])
    tl.store(factor + row, 2.0 / total[1])


@triton.jit
def row_gradients(h_hat, h, factor, g, out, REALS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient at row program_id(0) of `h_hat`, from that of its loss."""
    row = tl.program_id(0).to(tl.int64)
    real = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * REALS + real
    x = tl.load(h_hat + at, mask=real < REALS).to(tl.float32)
    y = tl.load(h + at, mask=real < REALS).to(tl.float32)
    d = (x - y) * (tl.load(factor + row) * tl.load(g + row))
    tl.store(out + at, d.to(out.dtype.element_ty), mask=real < REALS)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_hat: Tensor, h: Tensor) -> Tensor:
        h_hat, h = h_hat.contiguous(), h.contiguous()
        loss, factor = (torch.empty(len(h), device=h.device) for _ in range(2))
        row_losses[(len(h),)](h_hat, h, loss, factor, REALS=h[0].numel(), BLOCK=_BLOCK)
        ctx.save_for_backward(h_hat, h, factor)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        h_hat, h, factor = ctx.saved_tensors
        out, reals = torch.empty_like(h_hat), h[0].numel()
        grid = (len(h), triton.cdiv(reals, _BLOCK))
        g = gradients[0].contiguous()
        row_gradients[grid](h_hat, h, factor, g, out, REALS=reals, BLOCK=_BLOCK)
        return out, None


def paper_loss(h_hat: Tensor, h: Tensor) -> Tensor:
    """As `csipipe.measure.metrics.paper_loss`, of float32 or bfloat16: (B,) in float32.

    Its gradient has no gradient.
    """
    found: Tensor = _Losses.apply(h_hat, h)  # type: ignore[no-untyped-call]
    return found
