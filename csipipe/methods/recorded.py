"""Iterations of a rank on a GPU as one CUDA graph: Python decides once, kernels run every time.

The first iterations are computed as on a CPU: they load kernels and make the optimisers' state.
The next one is recorded, and from then on replayed, with the same bits: draws, rates and figures
lie in tensors that stay where they are. Checks of what was sent, of losses and of gradients are
read once per iteration, when all of it has been computed; its optimisers' steps come after them,
and change nothing if one doesn't hold. Then statistics are put back to what they were, and the
iteration is computed again without the graph, which names what is wrong.

Where nobody looks in between, an iteration is launched before the checks of the one before are
read, so that the device never waits for the host. If one of those doesn't hold, its steps change
nothing either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csipipe.comm import trust
from csipipe.comm.ledger import Ledger
from csipipe.device import download

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], None]], Replay]
_FIRST = 3
"""Iterations before the one that is recorded, as PyTorch advises."""


def on_a_stream() -> None:
    """Work from here on on a stream of its own: the GPU's default one can't be recorded."""
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def record(compute: Callable[[], None]) -> Replay:
    """Record what `compute` gives the GPU to do, without doing it; what does it."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    # other threads of the process may do what a recording thread mustn't
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        compute()
    return graph.replay


@dataclass(frozen=True)
class _Launched:
    """A replayed iteration, whose checks haven't been read.

    Attributes:
        kept: `Recorded`'s state before it.
        sound: whether all checks hold, on the host once `wait` has returned.
    """

    kept: list[list[Tensor]]
    sound: Tensor
    wait: Callable[[], None]


class Recorded:
    """What computes iterations: `launch`, then `settle`, of two iterations at most.

    Args:
        state: all on the device that an iteration changes, other than by an optimiser's step, and
            the next one reads, and what is drawn for an iteration. Called once, when some have been
            computed.
        ledgers: of what an iteration sends; they count it when it is settled.
        recorder: as `record`.
    """

    def __init__(
        self,
        state: Callable[[], Iterable[Tensor]],
        ledgers: Sequence[Ledger],
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self._find_state = state
        self._ledgers = ledgers
        self._record = recorder
        self._computed = 0
        self._replay: Replay | None = None
        self._state: list[list[Tensor]] = []  # by type: those of one type are copied together
        self._kept: deque[list[list[Tensor]]] = deque()
        self._crossing: list[Tensor] = []
        self._sound = torch.ones((), dtype=torch.bool, device=device)
        self._launched: deque[_Launched | None] = deque()  # None: computed at once

    @property
    def replays(self) -> bool:
        """Whether iterations are replayed by now."""
        return self._replay is not None

    def launch(self, compute: Callable[[], None], as_it_is: bool) -> None:
        """Begin an iteration; raises what `compute` raises, where that computes it.

        Args:
            as_it_is: not from the graph: somebody looks at it.

        Raises:
            ValueError: it can't be recorded: a model of the user's may want to know a value.
        """
        if as_it_is or self._computed < _FIRST:
            compute()
            self._computed += 1
            self._launched.append(None)
            return
        if not self._state:
            self._state = _by_type(self._find_state())
            self._kept += [[list(map(torch.empty_like, s)) for s in self._state] for _ in range(2)]
        self._kept.rotate()
        kept = self._kept[0]
        _copy(self._state, kept)
        if self._replay is None:
            self._replay = self._recording(compute)
        self._replay()
        self._launched.append(_Launched(kept, *download(self._sound)))

    def settle(self, compute: Callable[[], None]) -> None:
        """Wait until the oldest iteration that was launched is over, and read its checks.

        Args:
            compute: as for `launch`. Raises what it raises if one doesn't hold.

        Raises:
            FloatingPointError: only the replayed iteration was wrong, not the computed one.
        """
        oldest = self._launched.popleft()
        if oldest is None:
            return
        oldest.wait()
        if oldest.sound:
            for ledger, crossing in zip(self._ledgers, self._crossing, strict=True):
                ledger.counts += crossing
            return
        self._launched.clear()
        _copy(oldest.kept, self._state)
        compute()
        raise FloatingPointError(
            "an iteration was wrong when it was replayed as a CUDA graph, and right when it "
            "was computed: use train.cuda_graph never"
        )

    def _recording(self, compute: Callable[[], None]) -> Replay:
        before = [ledger.counts.clone() for ledger in self._ledgers]
        try:
            replay = self._record(lambda: self._recorded(compute))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None  # it can't end what it recorded, besides
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"an iteration can't be recorded as a CUDA graph ({reason}); use "
                "train.cuda_graph never."
            ) from error
        for ledger, counts in zip(self._ledgers, before, strict=True):
            self._crossing.append(ledger.counts - counts)
            ledger.counts.copy_(counts)
        return replay

    def _recorded(self, compute: Callable[[], None]) -> None:
        with trust.postponed() as later:
            compute()
        later.finish(self._sound)


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    of_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        of_type.setdefault(tensor.dtype, []).append(tensor.detach())
    return list(of_type.values())


def _copy(source: list[list[Tensor]], target: list[list[Tensor]]) -> None:
    for to, of in zip(target, source, strict=True):
        torch._foreach_copy_(to, of)
