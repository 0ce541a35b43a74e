"""Who takes part in an iteration, the same on every rank.

Of all UEs, those are present that the seed draws (topology.participants), known to every rank
beforehand: what crosses holds their rows and no others'. Where bad UEs are dropped, some of them
are left out again. For that, two numbers per UE cross twice an iteration of CSILocal: the first
stage calls the roll once it has checked all smashed data, before the tail's first forward pass; the
last stage gives its verdict once it has checked all gradients, before any weight changes. A verdict
against a UE repeats the iteration without it. Every attempt runs to its end on all ranks, with
zeros for what was bad, so that no message is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from csipipe.comm.channel import Channel
from csipipe.comm.ledger import Kind
from csipipe.comm.wire import Wire
from csipipe.pipeline.schedule import Attempts, Instruction, Op, Piece, Plan
from csipipe.settings.config import Settings

AGREED = {Op.ROLL_CALL: Kind.ROLL_CALL, Op.VERDICT: Kind.VERDICT}
"""The message by which each instruction agrees."""
_DRAWS, _EVALUATED = 2000, 3000  # distinct from the seeds of the UEs' own draws


def drawn(settings: Settings, iteration: int) -> list[int]:
    """UEs of an iteration, counted from 0, ascending: a function of the seed alone.

    Up to the averaging that ends them, iterations have the same ones.
    """
    together = iteration < settings.aggregated
    first = iteration - iteration % settings.aggregate_every if together else iteration
    return _some(settings, settings.participants, _DRAWS, first)


def averages(settings: Settings, iteration: int) -> bool:
    """Whether an iteration ends with an averaging of what the UEs share."""
    return iteration < settings.aggregated and (iteration + 1) % settings.aggregate_every == 0


def evaluated(settings: Settings) -> list[int]:
    """UEs that all evaluations of a run are over, ascending: a function of the seed alone."""
    return _some(settings, settings.run.eval_ues or settings.topology.ues, _EVALUATED)


def _some(settings: Settings, number: int, *what: int) -> list[int]:
    ues = settings.topology.ues
    if number >= ues:
        return list(range(ues))
    seed = np.random.SeedSequence((settings.train.seed, *what))
    order = np.argsort(seed.generate_state(ues, np.uint64), kind="stable")
    return sorted(order[:number].tolist())


def returning(settings: Settings, iteration: int) -> list[int]:
    """Those that begin an iteration with what they missed: who took no part in the one before.

    After the last averaging that are all UEs, and nobody misses anything again.
    """
    before = drawn(settings, iteration - 1) if iteration else range(settings.topology.ues)
    if iteration > settings.aggregated:
        return []
    last = iteration == settings.aggregated
    now = range(settings.topology.ues) if last else drawn(settings, iteration)
    return [ue for ue in now if ue not in before]


class Roster:
    """One rank's copy.

    Attributes:
        present: UEs whose rows are in what crosses now, ascending: those of the iteration or of
            the evaluation.
        behind: UEs that begin the iteration with what they missed.
        averages: whether the iteration ends with an averaging of what the UEs share.
        evaluated: those of evaluations.
        out: those of them that are left out.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._everyone = list(range(settings.topology.ues))
        self._channels: dict[Kind, Channel] = {}
        self._decides: set[Kind] = set()
        self._agreed: set[Kind] = set()
        self._holds = True
        self._idle = False
        self.present = self._everyone
        self.evaluated = evaluated(settings)
        self.behind: list[int] = []
        self.averages = False
        self.out: set[int] = set()

    def draw(self, iteration: int | None) -> None:
        """Those of an iteration are present; None: those of an evaluation."""
        self.present, self.behind, self.out = self.evaluated, [], set()
        if iteration is not None:
            self.present = drawn(self._settings, iteration)
            self.behind = returning(self._settings, iteration)
            self.averages = averages(self._settings, iteration)
            self._invite()

    def of(self, plan: Plan) -> list[Instruction]:
        """Of a plan that is cut by UE, what concerns UEs that take part."""
        present, behind = set(self.present), set(self.behind)
        back = (Op.SEND_MISSED, Op.RECEIVE_MISSED)
        return [
            i
            for i in plan
            if i.micro_batch is None or i.micro_batch in (behind if i.op in back else present)
        ]

    def connect(self, wire: Wire) -> None:
        """Agree with the other ranks on who is left out, from now on."""
        sources = {Kind.ROLL_CALL: 0, Kind.VERDICT: wire.topology.last_stage}
        self._channels = {
            kind: wire.announcements(kind, source, len(self._everyone))
            for kind, source in sources.items()
        }
        self._topology, self._rank = wire.topology, wire.topology.rank(wire.role)
        self._decides = {kind for kind, source in sources.items() if self._rank == source}
        self._others = {kind: channel.peers for kind, channel in self._channels.items()}

    def _invite(self) -> None:
        """Ranks with work in the iteration agree; the others would wait for a verdict too long."""
        if self._channels:
            works = self._topology.working(self.present)
            self._idle = self._rank not in works
            for kind in self._decides:
                peers = [peer for peer in self._others[kind] if peer.rank in works]
                self._channels[kind].peers = peers

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
        if not self._channels:
            execute(parts.attempt)
            return
        if self._idle:
            return
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
        if kind in self._decides:
            self.out.update(bad)
            mask = [float(ue in self.out) for ue in self._everyone]
            # waited for when the next one is sent
            channel.send(0, torch.tensor(mask, dtype=torch.float64))
        else:
            mask = channel.receive(0).tolist()
            self.out = {ue for ue, out in enumerate(mask) if out}
        self._holds = kind is not Kind.VERDICT or len(self.out) == before

    def _post(self) -> None:
        self._agreed.clear()
        for kind, channel in self._channels.items():
            if kind not in self._decides:
                channel.post()


def keep_buffers(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that restores BatchNorm's statistics to their present values."""
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]

    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore
