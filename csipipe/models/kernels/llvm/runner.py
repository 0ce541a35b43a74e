"""Runs kernels over the images of a mini-batch, by one thread or several.

What is summed over images is summed in fixed pieces, so that the numbers don't depend on how many
threads there are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from csipipe.models.kernels.llvm import stages
from csipipe.models.kernels.llvm.image import Frame, Image, Size, lane_counts, padded
from csipipe.models.kernels.llvm.machine import Describe, Library, Machine
from csipipe.models.kernels.llvm.norm import Doubles, totals
from csipipe.models.kernels.llvm.sources import Source

PIECE = 32
"""Images whose weight gradients are summed in float32; pieces are in float64."""


class Runner:
    """Kernels of one machine, and the memory that they work in."""

    def __init__(self, machine: Machine) -> None:
        self.lanes = machine.lanes
        self.library = Library(machine)
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1

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
        kernel = self.library.kernel(describe, *constants)

        def some(first: int, end: int) -> None:
            memory = {} if frame is None else self._memory(frame, taps)
            kernel(first, end, kernel.table(arrays | memory))

        self._share(some, images)

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
        sums = torch.empty(-(-images // PIECE), padded(taps), outputs, self.lanes)

        def some(first: int, end: int) -> None:
            memory = self._memory(frame, forward_taps(frame))
            memory |= {"plain": self._zeros(plain, "plain"), "sums": sums}
            table = kernel.table(arrays | memory)
            place = kernel.arrays.index("sums")
            for piece in range(first, end):
                table[place] = sums[piece].data_ptr()
                kernel(piece * PIECE, min(images, (piece + 1) * PIECE), table)

        self._share(some, len(sums))
        return torch.from_numpy(totals(sums)[:taps].T.astype(np.float32)).view_as(weight)

    def frame(self, image: Image, channels: int, size: Size) -> Frame:
        return Frame(image, channels, size, self.lanes)

    def sums(self, images: int, number: int, channels: int) -> Tensor:
        """What a kernel sums up per image, channel and lane."""
        return torch.empty(images, number, channels, self.lanes)

    def counts(self, image: Image) -> Doubles:
        """(L,) values of a channel in each lane."""
        return _counts(image, self.lanes)

    def _share(self, some: Callable[[int, int], None], number: int) -> None:
        threads = min(torch.get_num_threads(), number)
        if threads <= 1:
            some(0, number)
            return
        if self._pool is None or self._threads < threads:
            self._pool = ThreadPoolExecutor(threads, "kernels")
            self._threads = threads
        bounds = [number * n // threads for n in range(threads + 1)]
        for _ in self._pool.map(some, bounds[:-1], bounds[1:]):
            pass

    def _memory(self, frame: Frame, taps: Tensor | None) -> dict[str, Tensor]:
        assert taps is not None
        return {"frame": self._zeros(frame, "frame"), "taps": taps}

    def _zeros(self, frame: Frame, name: str) -> Tensor:
        """This thread's memory for a frame: kernels leave its zeros as they are."""
        frames = self._own.__dict__.setdefault(name, {})
        if frame not in frames:
            frames[frame] = torch.zeros(frame.size)
        found: Tensor = frames[frame]
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
