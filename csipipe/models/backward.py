"""Backward passes that begin with given gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def backward(outputs: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """As `torch.autograd.backward`, which compares shapes by SymPy: a second of CPU to load it.

    Args:
        gradients: this list is empty afterwards. A gradient that nobody else holds needn't be
            copied into a parameter's.
    """
    shapes = [output.shape for output in outputs], [gradient.shape for gradient in gradients]
    assert shapes[0] == shapes[1], shapes
    end: Tensor = _End.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
    torch.autograd.backward(end)


class _End(torch.autograd.Function):
    """A number, no matter which, that stands for all outputs, and passes on their gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = (None, *ctx.gradients)
        ctx.gradients.clear()
        return found
