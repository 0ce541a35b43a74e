"""Another cut of a model between UE and BTS than its own: `model.split`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csipipe.models.kernels import plain_layers


class Unsplittable(ValueError):
    """There is no such cut."""


def cut(
    parts: Sequence[Sequence[nn.Module]], split: tuple[int, int], row: tuple[int, ...]
) -> tuple[nn.Sequential, list[nn.Module], nn.Sequential]:
    """Encoder, tail and head with the layers before `split[0]`, between the two, and the rest.

    What crosses is a row of reals: where a layer makes something else, it is flattened before it
    crosses and gets its shape back behind.

    Args:
        parts: layers of encoder, tail and head as the model has them; sequences are taken apart.
        row: shape of one sample.

    Raises:
        Unsplittable: a place that doesn't exist; lists the layers.
    """
    chain = [layer for part in parts for layer in _spread(part)]
    first, second = split
    if not 1 <= first < second <= len(chain):
        names = ", ".join(f"{n} {type(layer).__name__}" for n, layer in enumerate(chain))
        raise Unsplittable(
            f"model.split is {list(split)}; expected [i, j] with 1 ≤ i < j ≤ {len(chain)}: layers "
            f"0 … i-1 are the encoder's, i … j-1 the tail's, the others the head's. The model's "
            f"layers are {names}."
        )
    shapes = _shapes(chain, row)
    pieces = [chain[:first], chain[first:second], chain[second:]]
    for place, left, right in ((first, 0, 1), (second, 1, 2)):
        if len(shapes[place]) > 1:
            pieces[left] = [*pieces[left], nn.Flatten()]
            pieces[right] = [nn.Unflatten(1, shapes[place]), *pieces[right]]
    return nn.Sequential(*pieces[0]), pieces[1], nn.Sequential(*pieces[2])


def _spread(layers: Sequence[nn.Module]) -> list[nn.Module]:
    spread: list[nn.Module] = []
    for layer in layers:
        spread += list(layer) if type(layer) is nn.Sequential else [layer]
    return spread


def _shapes(chain: Sequence[nn.Module], row: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shape of one row before each layer, and after the last."""
    x: Tensor = torch.zeros(1, *row)
    shapes = [row]
    with torch.no_grad(), plain_layers():
        for layer in chain:
            x = layer.eval()(x)
            layer.train()
            shapes.append(tuple(x.shape[1:]))
    return shapes
