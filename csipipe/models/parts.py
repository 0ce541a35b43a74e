"""The three parts of the model that `model.name` names: built from seeds, counted, checked.

Every part starts from a seed of its own, the same for all UEs; the tail is built whole from one
seed and cut afterwards, so that its weights don't depend on the partition. Shapes: B rows, A
angles, D delays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from csipipe.models.crblock import CRBlock
from csipipe.models.kernels import describe, plain_layers
from csipipe.settings.config import ModelSettings
from csipipe.settings.tables import MODELS, found

PARTS = ("encoder", "tail", "head")
_NAME = "model.name"
_NOWHERE = torch.device("meta")
_SMALL = 2**16
"""Values of an image."""


def build_encoder(model: ModelSettings, seed: int) -> nn.Module:
    """Encoder F1: (B, 2, A, D) → (B, c1)."""
    encoder: nn.Module = _seeded("encoder", model, seed)
    return encoder


def build_tail(model: ModelSettings, seed: int) -> list[nn.Module]:
    """Decoder tail F2 as a list of layers: (B, c1) → (B, c2)."""
    return list(_seeded("tail", model, seed))


def build_head(model: ModelSettings, seed: int) -> nn.Module:
    """Decoder head F3: (B, c2) → (B, 2, A, D) in [0, 1]."""
    head: nn.Module = _seeded("head", model, seed)
    return head


def _seeded(part: str, model: ModelSettings, seed: int) -> Any:
    """Build with torch's generator seeded for this part, and leave the global one as it was."""
    build = _builder(part, model)
    with torch.random.fork_rng(devices=[]):
        sequence = np.random.SeedSequence((seed, 1 + PARTS.index(part)))
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        return build()


def _builder(part: str, model: ModelSettings) -> Callable[[], Any]:
    spec = MODELS.get(model.name)
    if spec is not None:
        build = found(getattr(spec, part))
        return lambda: build(model)
    whole = found(model.name, _NAME)
    return lambda: whole(*model.image[1:], model.c1, model.c2)[PARTS.index(part)]


def check(model: ModelSettings) -> None:
    """Refuse a model whose parts don't fit together; takes little memory, the user's own none.

    Raises:
        ValueError: the user's own code can't be imported, fails, or gives other shapes.
    """
    row, codeword, output = model.image, (model.c1,), (model.c2,)
    ends: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        (row, codeword),
        (codeword, output),
        (output, row),
    ]
    for part, (before, after) in zip(PARTS, ends, strict=True):
        try:
            gives = _shapes(part, model, before)[-1]
        except Exception as error:  # the user's own code may raise anything
            raise ValueError(
                f"{_NAME} is {model.name!r}, whose {part} can't be built or run on a row of shape "
                f"{before}: {type(error).__name__}: {error}"
            ) from error
        if gives != after:
            raise ValueError(
                f"{_NAME} is {model.name!r}, whose {part} makes {gives} from a row of shape "
                f"{before}; it must be {after}, from model.c1, model.c2, model.angles and "
                "model.delays."
            )


def kernels_notes(model: ModelSettings, device: torch.device) -> list[str]:
    """Who computes a model's CRBlocks on a device, in words, if it has any; and make them ready."""
    blocks = (b for layer in _layers("tail", model) for b in layer.modules())
    block = next((b for b in blocks if isinstance(b, CRBlock)), None)
    if block is None:
        return []
    x = torch.zeros(2, *model.image, device=device)
    return [describe(block.fresh().to(device), x)]


def tail_shapes(model: ModelSettings) -> list[tuple[int, ...]]:
    """Shape of one row before each tail layer and after the last: 9 shapes for 8 layers."""
    return list(_shapes("tail", model, (model.c1,)))


@functools.cache
def _shapes(part: str, model: ModelSettings, row: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shape of one row before each of a part's layers and after the last.

    A model of csipipe's that is small computes the row: without values, PyTorch would first load
    its compiler, for three seconds of CPU.
    """
    small = model.name in MODELS and model.reals <= _SMALL
    shapes, device = [row], torch.device("cpu") if small else _NOWHERE
    with device, torch.no_grad(), plain_layers():
        x = torch.zeros(1, *row)
        for layer in _layers(part, model, device):
            x = layer.eval()(x)
            shapes.append(tuple(x.shape[1:]))
    return tuple(shapes)


def _layers(part: str, model: ModelSettings, device: torch.device = _NOWHERE) -> list[nn.Module]:
    """A part's layers; by default without memory."""
    with device:
        built = _seeded(part, model, 0)
    return list(built) if part == "tail" else [built]


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Trainable scalars of some modules (BatchNorm's running statistics are not counted)."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def count_parts(model: ModelSettings) -> dict[str, int]:
    """Trainable scalars of `encoder`, `tail` and `head`."""
    return {part: count_parameters(_layers(part, model)) for part in PARTS}


def count_statistics(model: ModelSettings) -> dict[str, int]:
    """BatchNorm's running means and variances in `encoder`, `tail` and `head`, in scalars."""
    return {
        part: sum(
            b.numel()
            for layer in _layers(part, model)
            for b in layer.buffers()
            if b.is_floating_point()
        )
        for part in PARTS
    }
