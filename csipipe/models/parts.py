"""The three parts of the model that `model.name` names: built from seeds, counted, checked.

Every part starts from a seed of its own, the same for all UEs; the tail is built whole from one
seed and cut afterwards, so that its weights don't depend on the partition. Shapes: B rows, A
angles, D delays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csipipe.models import requirements
from csipipe.models.crblock import CRBlock
from csipipe.models.cut import Unsplittable, cut
from csipipe.models.draws import reseed, watched
from csipipe.models.kernels import describe, plain_layers, why_not
from csipipe.models.layers import Conv2d, Linear
from csipipe.models.norm import BatchNorm2d
from csipipe.models.stacked import Unstackable, check_stackable
from csipipe.settings.config import ModelSettings
from csipipe.settings.tables import MODELS, PARTS, found, is_own

_NAME = "model.name"
_NOWHERE = torch.device("meta")
_SMALL = 2**16
"""Values of an image."""
_DRAWS = 2000  # distinct from the seeds of the parts' weights and of the UEs' mini-batches


def build_encoder(model: ModelSettings, seed: int) -> nn.Module:
    """Encoder F1: (B, 2, A, D) → (B, c1)."""
    encoder: nn.Module = _seeded("encoder", model, seed)
    return encoder


def build_tail(model: ModelSettings, seed: int) -> list[nn.Module]:
    """Decoder tail F2 as a list of layers: rows of as many reals as `widths` says."""
    layers = list(_seeded("tail", model, seed))
    if model.start == "pca":
        found(_by_pca(model)[1])(layers)
    return layers


def build_head(model: ModelSettings, seed: int) -> nn.Module:
    """Decoder head F3: what the tail makes → (B, 2, A, D)."""
    head: nn.Module = _seeded("head", model, seed)
    return head


def start(
    model: ModelSettings, encoder: nn.Module, head: nn.Module, rows: Sequence[Tensor]
) -> None:
    """Set parts by rows, each (B, 2, A, D), where `model.start` says so."""
    if model.start == "pca":
        found(_by_pca(model)[0])(encoder, head, torch.cat([part.cpu() for part in rows]))


def _by_pca(model: ModelSettings) -> tuple[str, str]:
    by_pca = MODELS[model.name].by_pca
    assert by_pca is not None
    return by_pca


def _seeded(part: str, model: ModelSettings, seed: int) -> Any:
    """Build a part; random layers draw from the seed too."""
    built = _cut(part, model, seed)
    for layer in requirements.layers(part, built):
        for module in layer.modules():
            if isinstance(module, BatchNorm2d | Linear):
                module.kernels_by = model.kernels_by
    for number, layer in enumerate(requirements.layers(part, built)):
        if _draws(part, model)[number]:
            reseed(layer, (seed, _DRAWS + PARTS.index(part), number))
    return built


def _cut(part: str, model: ModelSettings, seed: int) -> Any:
    """Build a part as `model.split` cuts it."""
    if model.split is None:
        return _drawn(part, model, seed)
    every = [requirements.layers(name, _drawn(name, model, seed)) for name in PARTS]
    return cut(every, model.split, model.image)[PARTS.index(part)]


def _drawn(part: str, model: ModelSettings, seed: int) -> Any:
    """Build with torch's generator seeded for this part, and leave the global one as it was."""
    build = _builder(part, model)
    with torch.random.fork_rng(devices=[]):
        sequence = np.random.SeedSequence((seed, 1 + PARTS.index(part)))
        # parts are drawn on the CPU; to seed GPUs too takes as long as to build one
        torch.default_generator.manual_seed(int(sequence.generate_state(1)[0]))
        return build()


def _builder(part: str, model: ModelSettings) -> Callable[[], Any]:
    if is_own(model.name):
        whole = found(model.name, _NAME)
        return lambda: whole(*_arguments(model))[PARTS.index(part)]
    spec = MODELS[model.name]
    build, inserted = found(getattr(spec, part)), None if spec.own_c2 else model.c2
    if inserted is None:
        return lambda: build(model)
    reals = model.reals
    around: dict[str, Callable[[], Any]] = {
        "encoder": lambda: build(model),
        "tail": lambda: [*build(model), Linear(reals, inserted)],
        "head": lambda: nn.Sequential(Linear(inserted, reals), *build(model)),
    }
    return around[part]


def _arguments(model: ModelSettings) -> tuple[int, int, int, int | None]:
    """What the user's own function is called with."""
    return *model.image[1:], model.c1, model.c2


@functools.cache
def _draws(part: str, model: ModelSettings) -> list[bool]:
    """Whether each layer of a part draws random numbers in training; computed as `_shapes` is."""
    shape: tuple[int, ...] = model.image
    for before in PARTS[: PARTS.index(part)]:
        shape = _shapes(before, model, shape)[-1]
    found, device = [], _where(model)
    with torch.random.fork_rng(devices=[]), device, torch.no_grad(), plain_layers():
        x = torch.zeros(2, *shape)
        for layer in requirements.layers(part, _cut(part, model, 0)):
            x, drawn = watched(layer.train(), x)
            found.append(drawn)
    return found


def widths(model: ModelSettings) -> tuple[int, int]:
    """Reals per sample that cross: what the encoder makes, and what the tail makes."""
    shapes = tail_shapes(model)
    return shapes[0][0], shapes[-1][0]


def check(model: ModelSettings) -> None:
    """Refuse a model whose parts don't fit together; takes little memory, the user's own none.

    Raises:
        ValueError: the user's own code can't be imported, fails, or gives other shapes; or
            `model.split` doesn't fit.
    """
    row: tuple[int, ...] = model.image
    if model.start == "pca" and model.c1 > model.reals:
        raise ValueError(
            f"model.start is pca and model.c1 {model.c1}, but a row has {model.reals} reals and as "
            "many components at most; lower model.c1, or use model.start random."
        )
    own = _own_parts(model) if is_own(model.name) else None
    output = None if model.c2 is None else (model.c2,)
    wanted = ((model.c1,), output, row) if model.split is None else (None, None, row)
    gives = row
    every = []
    for part, after in zip(PARTS, wanted, strict=True):
        before = gives
        try:
            every.append(_layers_on(_where(model), part, model))
            requirements.check(part, every[-1])
            gives = _shapes(part, model, before)[-1]
        except Unsplittable:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise ValueError(
                f"{_NAME} is {model.name!r}, whose {part} can't be built or run on a row of shape "
                f"{before}: {type(error).__name__}: {error}"
            ) from error
        if len(gives) != 1 if after is None else gives != after:
            expected = "(reals,), a row that can cross" if after is None else after
            raise ValueError(
                f"{_NAME} is {model.name!r}, whose {part} makes {gives} from a row of shape "
                f"{before}; it must be {expected}, from model.c1, model.c2, model.angles and "
                "model.delays."
            )
    (encoder,), tail, (head,) = every
    try:
        requirements.check_apart(*(own or (encoder, tail, head)))
    except ValueError as error:
        raise ValueError(f"{_NAME} is {model.name!r}, whose {error}.") from error


def _own_parts(model: ModelSettings) -> Sequence[Any]:
    """What a function of the user's own returns, without memory.

    Raises:
        ValueError: it isn't there, fails, or doesn't return three parts.
    """
    whole, given = found(model.name, _NAME), _arguments(model)
    called = f"{_NAME} is {model.name!r}, which, called with (angles, delays, c1, c2) = {given},"
    try:
        with _NOWHERE, torch.random.fork_rng(devices=[]):
            parts = whole(*given)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"{called} fails: {type(error).__name__}: {error}") from error
    if not isinstance(parts, tuple | list) or len(parts) != len(PARTS):
        one = f"a {type(parts).__name__}"
        made = f"{one} of {len(parts)}" if isinstance(parts, tuple | list) else one
        raise ValueError(f"{called} returns {made}; it must be ({', '.join(PARTS)}).")
    return parts


def check_stages(model: ModelSettings, stages: int) -> None:
    """Refuse (ValueError) more BTS stages than the tail has layers with parameters."""
    heavy = sum(count_parameters([layer]) > 0 for layer in layers("tail", model))
    if stages > heavy:
        raise ValueError(
            f"topology.stages is {stages}, but only {heavy} layer(s) of the tail of {model.name} "
            "have parameters, and every stage needs one; use fewer stages."
        )


def sketch_tail(model: ModelSettings) -> list[nn.Module]:
    """The tail's layers, without memory."""
    return list(layers("tail", model))


def kernels_notes(model: ModelSettings, device: torch.device) -> list[str]:
    """Who computes a model's CRBlocks on a device, and its small convolutions if somebody else."""
    every = [m for part in PARTS for layer in layers(part, model) for m in layer.modules()]
    first_of: dict[str, str] = {}
    for kind in (CRBlock, Conv2d):
        mine = (m for m in every if isinstance(m, kind) and m.kernels_by == model.kernels_by)
        for module in {module.shape: module for module in mine}.values():
            x = torch.zeros(2, module.in_channels, *model.image[1:], device=device)
            text = describe(module.fresh().to(device), x)
            first_of.setdefault(text.partition(" are ")[2], text)
    return list(first_of.values())


def unstackable(model: ModelSettings) -> str | None:
    """Why encoders and heads of several UEs can't be computed as one; None if they can."""
    try:
        for part in ("encoder", "head"):
            check_stackable(layers(part, model))
    except Unstackable as error:
        return str(error)
    return None


def without_kernels_stacked(model: ModelSettings) -> str | None:
    """What of encoders and heads a GPU has no kernels for when they are stacked; None: nothing."""
    missing = why_not("triton", "StackedConv2d", model.kernels_by)
    if missing is not None:
        return f"without kernels ({missing})"
    every = [m for part in ("encoder", "head") for x in layers(part, model) for m in x.modules()]
    return "a CRBlock" if any(isinstance(m, CRBlock) for m in every) else None


def tail_shapes(model: ModelSettings) -> list[tuple[int, ...]]:
    """Shape of one row before each tail layer and after the last: 9 shapes for 8 layers."""
    crosses: tuple[int, ...] = (model.c1,)
    if model.split is not None:
        crosses = _shapes("encoder", model, model.image)[-1]
    return list(_shapes("tail", model, crosses))


@functools.cache
def _shapes(part: str, model: ModelSettings, row: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shape of one row before each of a part's layers and after the last.

    A model of csipipe's that is small computes the row: without values, PyTorch would first load
    its compiler, for three seconds of CPU.
    """
    shapes, device = [row], _where(model)
    with device, torch.no_grad(), plain_layers():
        x = torch.zeros(1, *row)
        for layer in _layers_on(device, part, model):
            x = layer.eval()(x)
            shapes.append(tuple(x.shape[1:]))
    return tuple(shapes)


def _where(model: ModelSettings) -> torch.device:
    """Where shapes are found."""
    small = model.reals <= _SMALL and not is_own(model.name)
    return torch.device("cpu") if small else _NOWHERE


@functools.cache
def layers(part: str, model: ModelSettings) -> Sequence[nn.Module]:
    """A part's layers without memory, to be looked at and left as they are."""
    return tuple(_layers_on(_NOWHERE, part, model))


def _layers_on(device: torch.device, part: str, model: ModelSettings) -> list[nn.Module]:
    with device:
        return requirements.layers(part, _seeded(part, model, 0))


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Trainable scalars of some modules (BatchNorm's running statistics are not counted)."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def count_parts(model: ModelSettings) -> dict[str, int]:
    """Trainable scalars of `encoder`, `tail` and `head`."""
    return {part: count_parameters(layers(part, model)) for part in PARTS}


def count_frozen(model: ModelSettings) -> dict[str, int]:
    """Scalars of `encoder`, `tail` and `head` that the model itself keeps from learning."""
    return {
        part: sum(p.numel() for x in layers(part, model) for p in x.parameters())
        - count_parameters(layers(part, model))
        for part in PARTS
    }


def count_statistics(model: ModelSettings) -> dict[str, int]:
    """BatchNorm's running means and variances in `encoder`, `tail` and `head`, in scalars."""
    return {
        part: sum(
            b.numel()
            for layer in layers(part, model)
            for b in layer.buffers()
            if b.is_floating_point()
        )
        for part in PARTS
    }
