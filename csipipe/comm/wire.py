"""A rank's channels: who talks to whom about what, between UEs and BTS and between stages.

Everything that crosses is a tensor of a shape that both ends computed; nothing is unpickled. What
crosses between a UE and the BTS is checked by the receiver (`csipipe.comm.trust`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist

from csipipe.comm import codec as codecs
from csipipe.comm.channel import Channel, Peer, rows_of
from csipipe.comm.codec import Codec, Plain, Rounding
from csipipe.comm.ledger import Kind, Ledger
from csipipe.comm.loopback import Loopback
from csipipe.comm.topology import Topology
from csipipe.measure.clock import Clock
from csipipe.settings.config import Settings

_LAST_STAGE = (Kind.OUTPUT, Kind.OUTPUT_GRADIENT)  # the other kinds end at the first stage


class Wire:
    """Builds the channels of one role of this rank; knows who talks to whom about what.

    Args:
        role: this role, see `Topology`.
        settings: of the run.
        clock: counts this rank's time.
        loop: reaches this rank's other role, if it has one.

    Attributes:
        rows: rows of one UE in one micro-batch.
        micro_batches: micro-batches per iteration.
        terms: a line for every kind of message that one of this rank's UEs, or the BTS with a UE,
            exchanges; both ends must have the same ones.
        ledger: what this role sends and receives.
        rounding: of the messages that this role sends.
    """

    def __init__(
        self,
        topology: Topology,
        role: int,
        settings: Settings,
        device: torch.device,
        clock: Clock,
        loop: Loopback,
    ) -> None:
        train, self.comm = settings.train, settings.comm
        self.terms: set[str] = set()
        self.topology = topology
        self.role = role
        self.rows = train.batch_size // train.micro_batches
        self.micro_batches = train.micro_batches
        self.rounding = Rounding(train.seed, self.comm.rounding == "stochastic")
        self.device = device
        self.ledger = Ledger(topology.ues)
        self.clock = clock
        self._usual, self._limit = train.precision, train.max_rms
        self._loop = loop
        self._present: Collection[int] = range(topology.ues)
        self._laid: list[tuple[Channel, Callable[[], list[Peer]]]] = []

    def lay(self, present: Sequence[int]) -> None:
        """From now on micro-batches hold rows of the UEs in `present`, ascending, and no others.

        All roles do so between two iterations.
        """
        if list(present) != list(self._present):
            self._present = present
            for channel, peers in self._laid:
                channel.lay(peers())

    def link(self, kind: Kind, width: int) -> Channel:
        """Messages between UEs and a BTS stage, `width` scalars per row, ordered by UE number."""
        peers, name = self._across(kind, self.rows), self._codec(kind)
        for peer in peers:
            self.expect(kind, peer.ues, (self.rows, width), self.micro_batches)
        codec = codecs.of_rows(name, self.comm, self.rows, width, kind is Kind.SMASHED)
        shape = rows_of(peers), width
        channel = self._crossing(kind, peers, shape, self.micro_batches, codec)
        if kind is Kind.SMASHED:
            channel.noise = self.comm.noise
        self._laid.append((channel, lambda: self._across(kind, self.rows)))
        return channel

    def expect(self, kind: Kind, ues: Sequence[int], shape: tuple[int, int], messages: int) -> None:
        """Note messages that each of `ues` exchanges with the BTS, `messages` per iteration."""
        (rows, width), name = shape, self._codec(kind)
        for ue in ues:
            self.terms.add(f"UE {ue}: {messages} × {kind.name.lower()} of {rows} × {width} {name}")

    def reports(self, width: int) -> Channel:
        """Figures of every UE, `width` each, to rank 0: float64, on the host."""
        peers = self._across(Kind.REPORT, 1)
        return self._host_channel(Kind.REPORT, peers, (rows_of(peers), width))

    def announcements(self, kind: Kind, source: int, numbers: int) -> Channel:
        """Some numbers from rank `source` to every other rank, once: float64, on the host."""
        topology = self.topology
        others = [rank for rank in range(topology.world_size) if rank != source]
        ranks = others if topology.rank(self.role) == source else [source]
        roles = [topology.roles_of(rank)[0] for rank in ranks]
        return self._host_channel(kind, [self._peer(role, numbers) for role in roles], (numbers,))

    def weights(self, role: int, scalars: int) -> Channel:
        """Flattened weights of `role`, between it and the first stage.

        Any finite values are accepted: BatchNorm's batch counters are among them.
        """
        other = 0 if self.role else role
        channel = self._host_channel(Kind.WEIGHTS, [self._peer(other, scalars)], (scalars,))
        channel.limit = sys.float_info.max
        return channel

    def neighbour(
        self,
        kind: Kind,
        stage: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        timeout: float,
    ) -> Channel:
        """Activations or their gradients, `shape` per row, between this stage and `stage`.

        They are sent in the `dtype` in which stages compute, so that no bit depends on where the
        tail is cut.
        """

        def peers() -> list[Peer]:
            return [self._peer(stage, self.rows * len(self._present))]

        channel = Channel(
            kind,
            peers(),
            (rows_of(peers()), *shape),
            self.micro_batches,
            Plain(dtype),
            self.device,
            group=group,
            clock=self.clock,
            timeout=timeout,
        )
        self._laid.append((channel, peers))
        return channel

    def vector(self, kind: Kind, scalars: int, ues: range) -> Channel:
        """A vector of (1, scalars) between the BTS and each of `ues`; down, the same for all."""
        at_bts, host = self.topology.is_bts(self.role), self.topology.host
        peers = [self._peer(host(ue) if at_bts else 0, 1, range(ue, ue + 1)) for ue in ues]
        self.expect(kind, ues, (1, scalars), 1)
        codec = codecs.of_vector(self._codec(kind), self.comm, scalars)
        return self._crossing(kind, peers, (1, scalars), 1, codec)

    def unrecordable(self) -> str | None:
        """Why what is sent can't be recorded once and then only be replayed; None: it can."""
        for channel, _ in self._laid:
            if not isinstance(channel.codec, Plain):
                return "comm.codec packs messages"
            if channel.noise:
                return "comm.noise is drawn for every message"
        return None

    def _codec(self, kind: Kind) -> str:
        """Name of the codec of a kind of message."""
        return codecs.chosen(self.comm, self._usual).get(kind.name.lower(), self._usual)

    def _across(self, kind: Kind, rows: int) -> list[Peer]:
        """The other side of the UE–BTS boundary, `rows` per UE that is present."""
        topology, at_bts = self.topology, self.topology.is_bts(self.role)
        stage = topology.last_stage if kind in _LAST_STAGE else 0
        peers: list[Peer] = []
        for role in topology.ue_roles if at_bts else [self.role]:
            hosted, first = topology.ues_of(role), rows_of(peers)
            ues = [ue for ue in self._present if ue in hosted]
            if ues:
                place = slice(first, first + len(ues) * rows)
                peers.append(self._peer(role if at_bts else stage, place, ues))
        return peers

    def _peer(self, role: int, rows: int | slice, ues: Sequence[int] = ()) -> Peer:
        """The other end of a channel; as many rows as `rows` says where it is the only one."""
        rank, place = self.topology.rank(role), rows if isinstance(rows, slice) else slice(0, rows)
        loop = self._loop if rank == self.topology.rank(self.role) else None
        return Peer(rank, place, ues, self.topology.name(role), loop)

    def _crossing(
        self, kind: Kind, peers: list[Peer], shape: tuple[int, int], messages: int, codec: Codec
    ) -> Channel:
        """A channel between UEs and BTS: what it carries is counted, and checked on arrival."""
        return Channel(
            kind,
            peers,
            shape,
            messages,
            codec,
            self.device,
            self.ledger,
            limit=self._limit,
            clock=self.clock,
            rounding=self.rounding,
        )

    @staticmethod
    def _host_channel(kind: Kind, peers: list[Peer], shape: tuple[int, ...]) -> Channel:
        return Channel(kind, peers, shape, 1, Plain(torch.float64), torch.device("cpu"))
