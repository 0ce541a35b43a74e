"""The dimensions to which a model's last layers confine its reconstructions."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from csipipe.models.parts import layers
from csipipe.settings.config import ModelSettings

_OUTPUTS = (nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Identity)
"""Functions of each pixel alone, by which a decoder may end."""
_SHAPES = (nn.Flatten, nn.Unflatten)


def ceiling(model: ModelSettings) -> int | None:
    """As `confined`, of the model that the settings name."""
    return confined([*layers("tail", model), *layers("head", model)])


def confined(decoder: list[nn.Module]) -> int | None:
    """Fewest inputs of the linear layers by which a decoder ends; None: it ends otherwise.

    Before its output function the reconstruction lies in an affine space of as many dimensions,
    where PCA with as many components, of all channels that there could be, can't be beaten.

    Args:
        decoder: the tail's layers and the head.
    """
    found: list[int] = []
    full = 0
    for layer in reversed(list(_leaves(decoder))):
        if isinstance(layer, nn.Linear):
            full = full or layer.out_features
            found.append(layer.in_features)
        elif not isinstance(layer, _SHAPES) and (found or not isinstance(layer, _OUTPUTS)):
            break
    return min(found) if found and min(found) < full else None


def _leaves(layers: list[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _leaves(list(layer))
        else:
            yield layer
