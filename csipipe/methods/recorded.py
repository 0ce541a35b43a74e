"""Iterations of a rank on a GPU as one CUDA graph: Python decides once, kernels run every time.

The first iterations are computed as on a CPU: they load kernels and make the optimisers' state.
The next one is recorded, and from then on replayed, with the same bits: draws, rates and figures
lie in tensors that stay where they are. Checks of what was sent, of losses and of gradients are
read once per iteration, when all of it has been computed. If one doesn't hold, the rank's state is
put back to what it was, and the iteration is computed again without the graph, which names what is
wrong before any weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from csipipe.comm import trust
from csipipe.comm.ledger import Ledger

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


class Recorded:
    """What computes iterations.

    Args:
        state: all on the device that an iteration changes and the next one reads. Called once,
            when some iterations have been computed.
        ledgers: of what an iteration sends.
        recorder: as `record`.
    """

    def __init__(
        self,
        state: Callable[[], Iterable[Tensor]],
        ledgers: Sequence[Ledger],
        recorder: Recorder,
    ) -> None:
        self._state = state
        self._ledgers = ledgers
        self._record = recorder
        self._computed = 0
        self._replay: Replay | None = None
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        self._crossing: list[Tensor] = []
        self._sound: Tensor | None = None

    def iteration(self, compute: Callable[[], None], as_it_is: bool) -> None:
        """Compute an iteration; raises what `compute` raises.

        Args:
            as_it_is: not from the graph: somebody looks at it.

        Raises:
            ValueError: it can't be recorded: a model of the user's may want to know a value.
            FloatingPointError: only the replayed iteration was wrong, not the computed one.
        """
        if as_it_is or self._computed < _FIRST:
            compute()
            self._computed += 1
            return
        before = [ledger.counts.clone() for ledger in self._ledgers]
        if self._replay is None:
            self._replay = self._recording(compute)
            self._crossing = [
                ledger.counts - counts for ledger, counts in zip(self._ledgers, before, strict=True)
            ]
        else:
            for ledger, crossing in zip(self._ledgers, self._crossing, strict=True):
                ledger.counts += crossing
        self._replay()
        if not self._sound:
            for ledger, counts in zip(self._ledgers, before, strict=True):
                ledger.counts.copy_(counts)
            for live, kept in self._pairs:
                torch._foreach_copy_(live, kept)
            compute()
            raise FloatingPointError(
                "an iteration was wrong when it was replayed as a CUDA graph, and right when it "
                "was computed: use train.cuda_graph never"
            )

    def _recording(self, compute: Callable[[], None]) -> Replay:
        try:
            return self._record(lambda: self._recorded(compute))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"an iteration can't be recorded as a CUDA graph ({reason}); use "
                "train.cuda_graph never."
            ) from error

    def _recorded(self, compute: Callable[[], None]) -> None:
        """Keep the state, then compute."""
        of_type: dict[torch.dtype, list[Tensor]] = {}  # copied together
        for tensor in self._state():
            of_type.setdefault(tensor.dtype, []).append(tensor.detach())
        self._pairs = [(live, [torch.empty_like(t) for t in live]) for live in of_type.values()]
        for live, kept in self._pairs:
            torch._foreach_copy_(kept, live)
        with trust.postponed() as verdicts:
            compute()
        self._sound = torch.stack(verdicts).all()
