"""Runs kernels over the images of a mini-batch, by one thread or several.

What is summed over images is summed in fixed pieces, so that the numbers don't depend on how many
threads there are.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import torch
from torch import Tensor

from csipipe.models.kernels.llvm import stages
from csipipe.models.kernels.llvm.image import Frame, Image, Size, lane_counts, padded
from csipipe.models.kernels.llvm.machine import Describe, Kernel, Library, Machine
from csipipe.models.kernels.llvm.norm import Doubles, totals
from csipipe.models.kernels.llvm.sources import Source

PIECE = 8
"""Images whose weight gradients are summed in float32; pieces are in float64."""


class _Memory(threading.local):
    """Frames of those who run kernels: each has its own, for its team."""

    def __init__(self) -> None:
        self.frames: dict[tuple[str, Frame], Tensor] = {}


class Runner:
    """Kernels of one machine, and the memory that they work in."""

    def __init__(self, machine: Machine) -> None:
        self.lanes = machine.lanes
        self.library = Library(machine)
        self._memory = _Memory()

    def run(
        self,
        describe: Describe,
        constants: tuple[object, ...],
        images: int,
        arrays: dict[str, Tensor],
        frame: Frame | None = None,
        taps: Tensor | None = None,
    ) -> None:
        """Run a kernel over all images."""
        frames = {}
        if frame is not None:
            assert taps is not None
            arrays, frames = arrays | {"taps": taps}, {"frame": frame}
        self._share(self.library.kernel(describe, *constants), images, arrays, frames)

    def weight_gradient(
        self,
        image: Image,
        source: Source,
        gradient: Source,
        arrays: dict[str, Tensor],
        weight: Tensor,
        images: int,
    ) -> Tensor:
        """The gradient of a convolution's weight (outputs, inputs, high, wide)."""
        outputs, inputs, high, wide = weight.shape
        kernel = self.library.kernel(
            stages.weight_gradient, image, source, inputs, (high, wide), gradient, outputs
        )
        frame = self.frame(image, inputs, (high, wide))
        plain = self.frame(image, outputs, (1, 1))
        taps = inputs * high * wide
        bounds = torch.tensor([*range(0, images, PIECE), images])
        pieces = len(bounds) - 1
        sums = torch.empty(pieces, padded(taps), outputs, self.lanes)
        arrays = arrays | {"taps": forward_taps(frame), "sums": sums, "bounds": bounds}
        self._share(kernel, pieces, arrays, {"frame": frame, "plain": plain})
        return torch.from_numpy(totals(sums)[:taps].T.astype(np.float32)).view_as(weight)

    def frame(self, image: Image, channels: int, size: Size) -> Frame:
        return Frame(image, channels, size, self.lanes)

    def sums(self, images: int, number: int, channels: int) -> Tensor:
        """What a kernel sums up per image, channel and lane."""
        return torch.empty(images, number, channels, self.lanes)

    def counts(self, image: Image) -> Doubles:
        """(L,) values of a channel in each lane."""
        return _counts(image, self.lanes)

    def _share(
        self, kernel: Kernel, number: int, arrays: dict[str, Tensor], frames: dict[str, Frame]
    ) -> None:
        # all or one: OpenMP ends threads that a smaller team leaves out, and starts them again
        threads = torch.get_num_threads() if number > 1 else 1
        memory = {name: self._zeros(name, frame, threads) for name, frame in frames.items()}
        kernel(number, arrays | memory, threads)

    def _zeros(self, name: str, frame: Frame, threads: int) -> Tensor:
        """Memory for a frame of each thread: kernels leave its zeros as they are."""
        found = self._memory.frames.get((name, frame))
        if found is None or len(found) < threads:
            found = self._memory.frames[name, frame] = torch.zeros(threads, frame.size)
        return found


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


@functools.cache
def _counts(image: Image, lanes: int) -> Doubles:
    return np.array(lane_counts(image, lanes), np.float64)
