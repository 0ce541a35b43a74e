"""Convolutions as steps of a program: forward, back to the input, weight gradient.

Shapes and names as in `stages`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from csipipe.models.kernels.llvm import stages
from csipipe.models.kernels.llvm.host import library
from csipipe.models.kernels.llvm.image import Frame, Image, Size, padded
from csipipe.models.kernels.llvm.machine import Describe
from csipipe.models.kernels.llvm.program import Step
from csipipe.models.kernels.llvm.sources import Source


def forward(
    image: Image,
    source: Source,
    inputs: int,
    size: Size,
    outputs: int,
    biased: bool,
    moments: bool,
    arrays: Mapping[str, str],
) -> Step:
    """`stages.convolution`."""
    frame = _frame(image, inputs, size)
    constants = (image, source, inputs, size, outputs, biased, moments)
    return Step(stages.convolution, constants, arrays, {"frame": frame}, forward_taps(frame))


def back(
    describe: Describe,
    image: Image,
    source: Source,
    outputs: int,
    size: Size,
    inputs: int,
    arrays: Mapping[str, str],
) -> Step:
    """`stages.convolution_backward` or `stages.input_backward` of a convolution from `inputs` to
    `outputs` channels."""
    frame = _frame(image, outputs, size)
    constants = (image, source, outputs, size, inputs)
    return Step(describe, constants, arrays, {"frame": frame}, backward_taps(frame, inputs))


def weight_gradient(
    image: Image,
    source: Source,
    inputs: int,
    size: Size,
    gradient: Source,
    outputs: int,
    arrays: Mapping[str, str],
    weight: str,
) -> list[Step]:
    """`stages.weight_gradient`, and its `sums` to the array `weight`."""
    frame, plain = _frame(image, inputs, size), _frame(image, outputs, (1, 1))
    constants = (image, source, inputs, size, gradient, outputs)
    taps, frames = forward_taps(frame), {"frame": frame, "plain": plain}
    total = {"sums": arrays["sums"], "weight": weight}
    return [
        Step(stages.weight_gradient, constants, arrays, frames, taps),
        Step(stages.weight_total, (len(frame.taps), outputs), total),
    ]


def weight_sums(rows: int, inputs: int, size: Size, outputs: int) -> Tensor:
    """The array `sums` of a weight gradient."""
    cells = padded(inputs * size[0] * size[1]) * outputs
    return torch.empty(stages.pieces(rows), cells, library().machine.lanes)


def _frame(image: Image, channels: int, size: Size) -> Frame:
    return Frame(image, channels, size, library().machine.lanes)


@functools.cache
def forward_taps(frame: Frame) -> Tensor:
    """(taps, 2) inputs' and factors' places of a convolution; as many as `correlate` goes through.

    Weights are PyTorch's, (outputs, inputs, high, wide).
    """
    taps = frame.taps
    taps = taps + taps[:1] * (padded(len(taps)) - len(taps))
    return torch.tensor(list(enumerate(taps))).flip(1).contiguous()


@functools.cache
def backward_taps(frame: Frame, inputs: int) -> Tensor:
    """The same of the convolution that leads back to `inputs` channels, the kernel turned."""
    size = frame.kernel[0] * frame.kernel[1]
    taps = torch.arange(frame.channels * size)
    channel, at = taps // size, taps % size
    factors = channel * (inputs * size) + (size - 1 - at)
    return torch.stack([torch.tensor(frame.taps), factors], 1)
