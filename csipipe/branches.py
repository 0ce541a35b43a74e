"""Kernels that may run at the same time, on streams of a GPU."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch


class Branches:
    """Branches of a computation: none reads what another one writes, until they are joined.

    A kernel's last programs leave most of a GPU idle, and so does one that only adds up sums; what
    another branch has to do fills it. The first branch stays on the current stream. Tensors need no
    care (`Tensor.record_stream`) as long as all branches begin and are joined in one function, and
    what they read and hand on lives until then: each begins after all that was launched before, so
    memory that is freed in between is used again in its own branch, and other memory after the
    join. On a CPU branches run one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._begun = self._main.record_event()

    def branch(self, number: int) -> AbstractContextManager[object]:
        """In it kernels are launched, and memory is allocated, in a branch."""
        if self._device.type != "cuda" or number == 0:
            return contextlib.nullcontext()
        stream = _stream(self._device, number)
        stream.wait_event(self._begun)
        self._used.append(stream)
        return torch.cuda.stream(stream)

    def join(self) -> None:
        """From here on the current stream has what all branches have computed."""
        for stream in self._used:
            self._main.wait_stream(stream)


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
