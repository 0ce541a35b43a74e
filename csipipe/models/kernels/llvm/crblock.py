"""CRBlock on a CPU by kernels of our own: forward, input gradient, weight gradients.

Shapes: B images, A angles, D delays, L lanes. A convolution's place is its path's number and its
own, "0.1", and the 1×1 convolution's is "join"; arrays are named by them. `z` is what comes out
of a convolution, `q` the gradient at its BatchNorm's output, `norm` what kernels know of that,
`dz` the gradient at the join's output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from csipipe.models.crblock import CHANNELS, CRBlock
from csipipe.models.kernels.llvm import norm as norms
from csipipe.models.kernels.llvm import stages, steps
from csipipe.models.kernels.llvm.host import image_of, library, reason_against
from csipipe.models.kernels.llvm.image import Image, Size
from csipipe.models.kernels.llvm.program import Arrays, Program, Step
from csipipe.models.kernels.llvm.sources import Source

Paths = tuple[tuple[Size, ...], ...]
JOIN = "join"


@dataclass(frozen=True)
class Convolution:
    """A convolution of a path; `before` and `after` are its neighbours' places, if it has some."""

    place: str
    before: str | None
    after: str | None
    path: int
    inputs: int
    size: Size

    @property
    def input(self) -> tuple[Source, dict[str, str]]:
        """Where its input comes from."""
        if self.before is None:
            return "stored", {"x": "x"}
        return "active", {"z": f"z {self.before}", "norm": f"norm {self.before}"}

    @property
    def gradient(self) -> tuple[Source, dict[str, str]]:
        """Where the gradient at its output comes from."""
        arrays = {"z": f"z {self.place}", "norm": f"norm {self.place}"}
        if self.after is not None:
            return "normed", arrays | {"q": f"q {self.place}"}
        return "joined", arrays | {"dz": "dz", "w": f"w {self.path}"}


def forward(block: CRBlock, x: Tensor, training: bool) -> tuple[Tensor, Arrays]:
    """(B, 2, A, D) → (B, 2, A, D); in training mode running statistics follow."""
    x, image = x.contiguous(), image_of(x)
    out = torch.empty_like(x)
    arrays = {"x": x, "out": out.detach(), f"z {JOIN}": torch.empty_like(x)}
    join, join_norm = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(block.join))
    for path, weight in enumerate(join.weight.detach().flatten(1).chunk(len(block.paths), 1)):
        arrays[f"w {path}"] = weight.contiguous()
    arrays |= _of_norm(JOIN, join_norm)
    for c, (convolution, norm) in zip(convolutions(block.shape), _layers(block), strict=True):
        arrays[f"z {c.place}"] = x.new_empty(len(x), CHANNELS, image.angles, image.delays)
        arrays[f"weight {c.place}"] = convolution.weight
        arrays |= _of_norm(c.place, norm)
        if training:
            _count(norm)
    if training:
        _count(join_norm)
    constants = training, join_norm.eps, cast(float, join_norm.momentum)
    program = _forward(block.shape, image, *constants)
    program.run(len(x), arrays | ({"sums": _sums(x, 2)} if training else {}))
    return out, arrays


def input_gradient(
    block: CRBlock, saved: Arrays, dy: Tensor, wanted: bool = True
) -> tuple[Tensor, Arrays]:
    """The gradient at the block's input, wanted or not."""
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    rest = {"dz": torch.empty_like(dx), f"of {JOIN}": dx.new_empty(2, CHANNELS * len(block.shape))}
    for c in convolutions(block.shape):
        rest |= _of_gradients(c.place, saved)
        if c.after is not None:
            rest[f"q {c.place}"] = torch.empty_like(saved[f"z {c.place}"])
    rest |= _of_gradients(JOIN, saved)
    arrays = saved | rest | {"dy": dy.contiguous(), "dx": dx}
    arrays |= {"sums": _sums(dx, 2)}
    arrays |= {f"sums {path}": _sums(dx, 4) for path in range(len(block.shape))}
    _input_gradient(block.shape, image_of(dx)).run(len(dx), arrays)
    return dx, rest


def weight_gradients(block: CRBlock, saved: Arrays, rest: Arrays) -> list[Tensor]:
    """The gradients of all parameters, in the order of `block.parameters()`."""
    x, found = saved["x"], []
    arrays = saved | rest
    for c in convolutions(block.shape):
        weight = torch.empty_like(saved[f"weight {c.place}"])
        arrays[f"of weight {c.place}"] = weight
        arrays[f"sums {c.place}"] = steps.weight_sums(len(x), c.inputs, c.size, CHANNELS)
        found += [weight, rest[f"of scale {c.place}"], rest[f"of shift {c.place}"]]
    _weight_gradients(block.shape, image_of(x)).run(len(x), arrays)
    of_join = rest[f"of {JOIN}"][..., None, None]
    return [*found, of_join, rest[f"of scale {JOIN}"], rest[f"of shift {JOIN}"]]


@functools.cache
def convolutions(paths: Paths) -> list[Convolution]:
    """Those of all paths."""
    found = []
    for path, sizes in enumerate(paths):
        places = [None, *(f"{path}.{n}" for n in range(len(sizes))), None]
        for n, size in enumerate(sizes):
            before, place, after = places[n : n + 3]
            assert place is not None
            inputs = 2 if before is None else CHANNELS
            found.append(Convolution(place, before, after, path, inputs, size))
    return found


@functools.cache
def _forward(paths: Paths, image: Image, training: bool, eps: float, momentum: float) -> Program:
    def norm(place: str, channels: int) -> Step:
        arrays = _norm_names(place) | {"sums": "sums"}
        if training:
            return Step(norms.of_batch, (image, channels, eps, momentum), arrays)
        return Step(norms.of_running, (channels, eps), arrays)

    program = []
    for c in convolutions(paths):
        source, arrays = c.input
        arrays |= {"out z": f"z {c.place}", "weights": f"weight {c.place}", "sums": "sums"}
        program += [
            steps.forward(image, source, c.inputs, c.size, CHANNELS, False, training, arrays),
            norm(c.place, CHANNELS),
        ]
    arrays = _ends(paths) | {"z": f"z {JOIN}", "sums": "sums"}
    residual = {"z": f"z {JOIN}", "norm": f"norm {JOIN}", "x": "x", "out": "out"}
    program += [
        Step(stages.join, (image, len(paths), CHANNELS, training), arrays),
        norm(JOIN, 2),
        Step(stages.residual, (image,), residual),
    ]
    return Program(library(), program)


@functools.cache
def _input_gradient(paths: Paths, image: Image) -> Program:
    def norm(place: str, channels: int, sums: str = "sums", path: int | None = None) -> Step:
        arrays = _norm_names(place) | {"sums": sums, "of join": f"of {JOIN}"}
        constants = (image, channels, 0 if path is None else len(paths), path or 0)
        return Step(norms.backward, constants, arrays)

    join = {"z": f"z {JOIN}", "norm": f"norm {JOIN}", "q": "dx"}
    output = join | {"out": "out", "dy": "dy", "sums": "sums"}
    of_paths = {f"{path} sums": f"sums {path}" for path in range(len(paths))}
    program = [
        Step(stages.output_backward, (image, 2), output),
        norm(JOIN, 2),
        Step(
            stages.join_backward,
            (image, len(paths), CHANNELS),
            _ends(paths) | join | {"dz": "dz"} | of_paths,
        ),
    ]
    for c in convolutions(paths):
        if c.after is None:
            program.append(norm(c.place, CHANNELS, f"sums {c.path}", c.path))
    for c in reversed(convolutions(paths)):
        source, arrays = c.gradient
        arrays["weights"] = f"weight {c.place}"
        describe = stages.input_backward if c.before is None else stages.convolution_backward
        arrays |= {"dx": "dx", "sums": "sums"}
        arrays |= {f"in {name}": f"{name} {c.before}" for name in ("z", "q", "norm")}
        program.append(steps.back(describe, image, source, CHANNELS, c.size, c.inputs, arrays))
        if c.before is not None:
            program.append(norm(c.before, CHANNELS))
    return Program(library(), program)


@functools.cache
def _weight_gradients(paths: Paths, image: Image) -> Program:
    program = []
    for c in convolutions(paths):
        source, of_input = c.input
        gradient, arrays = c.gradient
        arrays |= {f"in {name}": array for name, array in of_input.items()}
        arrays["sums"] = f"sums {c.place}"
        program += steps.weight_gradient(
            image, source, c.inputs, c.size, gradient, CHANNELS, arrays, f"of weight {c.place}"
        )
    return Program(library(), program)


def _ends(paths: Paths) -> dict[str, str]:
    """What the join reads of every path."""
    return {
        f"{c.path} {name}": f"{name} {c.path if name == 'w' else c.place}"
        for c in convolutions(paths)
        if c.after is None
        for name in ("z", "norm", "w")
    }


_NORM = "scale", "shift", "mean", "variance", "norm", "of scale", "of shift"


def _norm_names(place: str) -> dict[str, str]:
    """The arrays of a BatchNorm's kernels."""
    return {name: f"{name} {place}" for name in _NORM}


def _of_norm(place: str, norm: nn.BatchNorm2d) -> Arrays:
    """A BatchNorm's arrays in the forward pass."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    found = norm.weight, norm.bias, norm.running_mean, norm.running_var
    arrays = {f"{name} {place}": t for name, t in zip(_NORM, found, strict=False)}
    return arrays | {f"norm {place}": torch.empty(6, norm.num_features)}


def _of_gradients(place: str, saved: Arrays) -> Arrays:
    """Memory for the gradients of a BatchNorm's weights."""
    return {f"of {name} {place}": torch.empty_like(saved[f"{name} {place}"]) for name in _NORM[:2]}


def _count(norm: nn.BatchNorm2d) -> None:
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)


def _sums(x: Tensor, number: int) -> Tensor:
    """What kernels sum up per image, channel and lane."""
    return x.new_empty(len(x), number, CHANNELS, library().machine.lanes)


def _layers(block: CRBlock) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions of all paths, with their BatchNorms."""
    for path in block.paths:
        for layer in path.children():
            if isinstance(layer, nn.Sequential):
                yield cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(layer))


def reason(block: CRBlock, x: Tensor) -> str | None:
    """Why these kernels can't compute this block on this input; None if they can."""
    if torch.is_grad_enabled() and not block.training:
        return "they have gradients in training mode only"
    if block.training and len(x) * image_of(x).size == 1:
        return "BatchNorm needs more than one value per channel"
    return reason_against(block, x)
