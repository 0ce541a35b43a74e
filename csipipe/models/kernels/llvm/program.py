"""Kernels that run one after the other over a mini-batch.

Python's share of a call is as large as a small kernel's, so a program is put together once and
then runs in one call: each thread goes through all kernels, and waits after each for the others.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from csipipe.models.kernels.llvm.image import Frame
from csipipe.models.kernels.llvm.language import Function
from csipipe.models.kernels.llvm.machine import Describe, Library

Arrays = dict[str, Tensor]
"""A program's arrays by name."""


@dataclass(frozen=True)
class Step:
    """A kernel in a program.

    Attributes:
        describe, constants: the kernel.
        arrays: the program's names of the kernel's arrays.
        frames: memory that a thread works in, by the kernel's names.
        taps: the kernel's `taps`, if it has some.
    """

    describe: Describe
    constants: tuple[object, ...]
    arrays: Mapping[str, str]
    frames: Mapping[str, Frame] = field(default_factory=dict)
    taps: Tensor | None = None


class _Memory(threading.local):
    """Frames of those who run programs: each has its own, for its team."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, Frame], Tensor] = {}

    def zeros(self, name: str, frame: Frame, threads: int) -> Tensor:
        """Memory for a frame of each thread: kernels leave its zeros as they are."""
        found = self._frames.get((name, frame))
        if found is None or len(found) < threads:
            found = self._frames[name, frame] = torch.zeros(threads, frame.size)
        return found


_memory = _Memory()


def one_by_one(f: Function) -> None:
    """Call as many functions as the table has rows: `steps` holds each one's address and table."""
    steps = f.integers("steps")
    with f.loop(0, f.rows) as n:
        f.call(steps[n * 2], steps[n * 2 + 1])


class Program:
    """Steps that run one after the other.

    Their tables lie in one piece of memory, after those of `one_by_one`: each run gets a copy, with
    the number of rows and the arrays' addresses filled in.
    """

    def __init__(self, library: Library, steps: Sequence[Step]) -> None:
        self._run = library.kernel(one_by_one)
        self._kept = library, steps  # tables hold the addresses of code and taps
        keys: dict[str | tuple[str, Frame], int] = {}
        words = [len(steps), 2, *[0] * (2 * len(steps))]
        within, rows, places, which = [1], [], [], []
        for n, step in enumerate(steps):
            kernel = library.kernel(step.describe, *step.constants)
            words[2 + 2 * n : 4 + 2 * n] = [kernel.address, len(words)]
            within.append(3 + 2 * n)
            rows.append(len(words))
            words.append(0)
            for name in kernel.arrays:
                if name == "taps":
                    assert step.taps is not None
                    words.append(step.taps.data_ptr())
                    continue
                frame = step.frames.get(name)
                key = step.arrays[name] if frame is None else (name, frame)
                places.append(len(words))
                which.append(keys.setdefault(key, len(keys)))
                words.append(0)
        self._keys, self._words = list(keys), np.array(words)
        self._words[within] *= self._words.itemsize
        self._within, self._rows = np.array(within), np.array(rows)
        self._places, self._which = np.array(places), np.array(which)

    def run(self, rows: int, arrays: Mapping[str, Tensor]) -> None:
        """Run over a mini-batch of so many rows."""
        # all or one: OpenMP ends threads that a smaller team leaves out, and starts them again
        threads = torch.get_num_threads() if rows > 1 else 1
        addresses = [
            (arrays[key] if isinstance(key, str) else _memory.zeros(*key, threads)).data_ptr()
            for key in self._keys
        ]
        words = self._words.copy()
        address = words.ctypes.data
        words[self._within] += address
        words[self._rows] = rows
        words[self._places] = np.array(addresses)[self._which]
        self._run(address, threads)
