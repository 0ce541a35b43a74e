"""Initial weights that published models start from."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def xavier(module: _Module, biases: bool = False) -> _Module:
    """Xavier's uniform range for linear layers and convolutions, as TensorFlow does by default.

    Args:
        biases: start them at 0, as TensorFlow does; otherwise they stay as PyTorch drew them.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if biases and layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module
