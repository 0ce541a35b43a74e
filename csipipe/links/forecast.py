"""Seconds that an iteration's transfers take on given links, from the methods' own schedules.

Every rank's list of instructions (`csipipe.pipeline.schedule`) is played with messages that take
their bytes over the link's rate: a link carries one message after the other in each direction,
both directions at a time; a rank goes on when it has handed a message over. Computing takes no
time here: `seconds` adds what an iteration takes without links, so what computing hides of the
transfers is hidden from the forecast too, which is then too long by as much.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from csipipe.comm.ledger import Kind
from csipipe.comm.topology import Topology
from csipipe.links.network import Link
from csipipe.methods.cost import message_bytes
from csipipe.pipeline.rounds import federated_training, with_averaging
from csipipe.pipeline.schedule import Op, split_training
from csipipe.settings.config import Settings

FRAME = 1514 / 1448
"""Bytes on the link for one that is sent: Ethernet, IPv4 and TCP with time stamps, in full frames
of 1,500 bytes."""
_NAMES = {
    Kind.SMASHED: "z",
    Kind.OUTPUT: "output",
    Kind.OUTPUT_GRADIENT: "gradient",
    Kind.SMASHED_GRADIENT: "dz",
    Kind.UPDATE: "update",
    Kind.MEAN_UPDATE: "mean",
}
Message = tuple[str, int, int | None]
"""What crosses: its name, the UE rank at one end (stages: -1), its micro-batch or UE."""


def seconds(settings: Settings, links: Sequence[Link], computing: float) -> float:
    """An iteration of training, in seconds: the median of those with and without an averaging.

    Args:
        links: of every UE rank.
        computing: seconds of an iteration where links cost nothing.
    """
    every = settings.aggregate_every
    averaging = _Play(settings, links, averaging=True).last()
    plain = _Play(settings, links, averaging=False).last() if every > 1 else averaging
    return computing + statistics.median([averaging, *[plain] * (every - 1)])


class _Play:
    """The ranks' instructions, with a clock for each rank and each direction of each link."""

    def __init__(self, settings: Settings, links: Sequence[Link], averaging: bool) -> None:
        train, stages = settings.train, settings.stages
        placed = Topology.of(settings, stages + len(links))
        self.links, self.stages = links, stages
        self.hosted = [placed.ues_of(stages + host) for host in range(len(links))]
        crosses = [Kind[crossing.upper()] for crossing in settings.spec.crosses]
        self.bits = {_NAMES[kind]: message_bytes(settings, kind) * 8 * FRAME for kind in crosses}
        if settings.spec.pipelined:
            plans = split_training(
                *(train.schedule, stages, len(links), train.micro_batches),
                drop=False,
                frozen=train.frozen,
            )
            if settings.spec.aggregates and averaging:
                plans = with_averaging(plans, stages, self.hosted, absent=False)
        else:
            plans = federated_training(self.hosted)
        self.plans = [deque([*p.once, *p.attempt, *p.end, *p.after]) for p in plans]
        self.now = [0.0] * len(plans)
        self.free = {(way, host): 0.0 for way in ("up", "down") for host in range(len(links))}
        self.arrived: dict[Message, float] = {}

    def last(self) -> float:
        """Seconds until the last rank is done."""
        while any(self.plans):
            ready = [rank for rank, plan in enumerate(self.plans) if plan and self._can(rank)]
            rank = min(ready, key=self.now.__getitem__)
            op, number = self.plans[rank][0].op, self.plans[rank][0].micro_batch
            for message in self._awaited(rank):
                self.now[rank] = max(self.now[rank], self.arrived[message])
            self.plans[rank].popleft()
            self._send(rank, op, number)
        return max(self.now)

    def _can(self, rank: int) -> bool:
        return all(message in self.arrived for message in self._awaited(rank))

    def _awaited(self, rank: int) -> list[Message]:
        """Messages that the rank's next instruction waits for."""
        instruction = self.plans[rank][0]
        m, hosts = instruction.micro_batch, range(len(self.links))
        if rank >= self.stages:
            host = rank - self.stages
            name = {
                Op.RECEIVE_FORWARD: "output",
                Op.RECEIVE_BACKWARD: "dz",
                Op.RECEIVE_MEAN: "mean",
            }.get(instruction.op)
            return [(name, host, m)] if name else []
        if instruction.op is Op.RECEIVE_FORWARD:
            inner = [(f"activation {rank}", -1, m)]
            return [("z", host, m) for host in hosts] if rank == 0 else inner
        if instruction.op is Op.RECEIVE_BACKWARD:
            inner = [(f"its gradient {rank}", -1, m)]
            outer = [("gradient", host, m) for host in hosts]
            return outer if rank == self.stages - 1 else inner
        if instruction.op is Op.RECEIVE_UPDATE:
            return [("update", self._host(m), m)]
        return []

    def _send(self, rank: int, op: Op, m: int | None) -> None:
        hosts = range(len(self.links))
        if rank >= self.stages:
            host = rank - self.stages
            name = {
                Op.SEND_FORWARD: "z",
                Op.SEND_BACKWARD: "gradient",
                Op.SEND_UPDATE: "update",
            }.get(op)
            if name:
                ues = 1 if name == "update" else len(self.hosted[host])
                self._cross("up", name, host, m, ues, self.now[rank])
        elif op is Op.SEND_FORWARD and rank == self.stages - 1:
            for host in hosts:
                self._cross("down", "output", host, m, len(self.hosted[host]), self.now[rank])
        elif op is Op.SEND_BACKWARD and rank == 0:
            for host in hosts:
                self._cross("down", "dz", host, m, len(self.hosted[host]), self.now[rank])
        elif op is Op.SEND_FORWARD:
            self.arrived[(f"activation {rank + 1}", -1, m)] = self.now[rank]
        elif op is Op.SEND_BACKWARD:
            self.arrived[(f"its gradient {rank - 1}", -1, m)] = self.now[rank]
        elif op is Op.SEND_MEAN:
            for host, hosted in enumerate(self.hosted):
                for ue in hosted:
                    self._cross("down", "mean", host, ue, 1, self.now[rank])

    def _cross(self, way: str, name: str, host: int, m: int | None, ues: int, since: float) -> None:
        link = self.links[host]
        speed = link.up if way == "up" else link.down
        done = max(self.free[way, host], since) + self.bits[name] * ues / speed
        self.free[way, host] = done
        self.arrived[(name, host, m)] = done + link.delay

    def _host(self, ue: int | None) -> int:
        return next(host for host, ues in enumerate(self.hosted) if ue in ues)
