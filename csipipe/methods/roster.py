"""Who takes part in an iteration of CSILocal where bad UEs are dropped, the same on every rank.

Two numbers per UE cross twice an iteration: the first stage calls the roll once it has checked all
smashed data, before the tail's first forward pass; the last stage gives its verdict once it has
checked all gradients, before any weight changes. A verdict against a UE repeats the iteration
without it. Every attempt runs to its end on all ranks, with zeros for what was bad, so that no
message is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from csipipe.comm.ledger import Kind
from csipipe.comm.wire import Wire
from csipipe.pipeline.schedule import Attempts, Op, Piece

AGREED = {Op.ROLL_CALL: Kind.ROLL_CALL, Op.VERDICT: Kind.VERDICT}
"""The message by which each instruction agrees."""


class Roster:
    """One rank's copy.

    Attributes:
        out: UEs that are left out of this iteration.
    """

    def __init__(self, wire: Wire) -> None:
        self._ues = wire.topology.ues
        self._rank = wire.topology.rank(wire.role)
        self._sources = {Kind.ROLL_CALL: 0, Kind.VERDICT: wire.topology.last_stage}
        self._channels = {
            kind: wire.announcements(kind, source, self._ues)
            for kind, source in self._sources.items()
        }
        self._agreed: set[Kind] = set()
        self._holds = True
        self.out: set[int] = set()

    def train(
        self,
        parts: Attempts[Piece],
        execute: Callable[[list[Piece]], None],
        undo: Callable[[], None],
    ) -> None:
        """One iteration, repeated until the verdict leaves nobody else out.

        Args:
            undo: reverts what an attempt changed, and posts its receives again.
        """
        self.out = set()
        execute(parts.once)
        while True:
            self._post()
            execute(parts.attempt)
            if self._holds:
                break
            undo()
        execute(parts.end)

    def agree(self, kind: Kind, bad: Iterable[int] = ()) -> None:
        """Leave out the UEs that are `bad`, of which only the deciding rank knows.

        Of a rank's two roles, the first to ask agrees for both.
        """
        if kind in self._agreed:
            return
        self._agreed.add(kind)
        channel = self._channels[kind]
        before = len(self.out)
        if self._rank == self._sources[kind]:
            self.out.update(bad)
            mask = [float(ue in self.out) for ue in range(self._ues)]
            # waited for when the next one is sent
            channel.send(0, torch.tensor(mask, dtype=torch.float64))
        else:
            mask = channel.receive(0).tolist()
            self.out = {ue for ue, out in enumerate(mask) if out}
        self._holds = kind is not Kind.VERDICT or len(self.out) == before

    def _post(self) -> None:
        self._agreed.clear()
        for kind, source in self._sources.items():
            if self._rank != source:
                self._channels[kind].post()


def keep_buffers(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that restores BatchNorm's statistics to their present values."""
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]

    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore
