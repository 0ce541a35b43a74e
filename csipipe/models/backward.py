"""Backward passes that begin with given gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """As `torch.autograd.backward`, which compares shapes by SymPy: a second of CPU to load it."""
    for output, gradient in zip(outputs, gradients, strict=True):
        assert output.shape == gradient.shape, (output.shape, gradient.shape)
    end: Tensor = _End.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
    torch.autograd.backward(end)


class _End(torch.autograd.Function):
    """A number that stands for all outputs, and passes on their gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gradients)
