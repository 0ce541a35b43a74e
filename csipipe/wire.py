"""Tensors between UEs and BTS and between stages.

The only file that moves tensors between ranks. A message carries the rows of one micro-batch
that one rank owns; its tag says which kind of message and which micro-batch it is, so that a
smashed-data tensor can't be taken for a gradient.

Everything that crosses is a tensor of a shape that both ends computed; nothing is unpickled. What
crosses between a UE and the BTS is checked by who receives it (`csipipe.trust`).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from csipipe import trust
from csipipe.blame import EVERYONE, watch
from csipipe.clock import Clock
from csipipe.device import download, host_buffer, upload
from csipipe.ledger import COUNTED, UP, Kind, Ledger
from csipipe.topology import Topology

_LAST_STAGE = (Kind.OUTPUT, Kind.OUTPUT_GRADIENT)  # the other kinds end at the first stage
_NAMES = {Kind.SMASHED: "smashed data", Kind.OUTPUT: "tail output"}
_SLOTS = 1 << 20  # tags: kind * _SLOTS + micro-batch


@dataclass(frozen=True)
class Peer:
    """The other end of a channel: its rank, its rows of every micro-batch, whose, and its role."""

    rank: int
    rows: slice
    ues: range = range(0)
    role: str = ""


_Works = list[tuple[dist.Work, Peer, Tensor]]


class Channel:
    """Messages of one kind between this rank and its peers, one per micro-batch.

    Made by `Wire`. Receives are posted ahead into a ring of buffers, sends are not waited for.
    Unless the group is NCCL's, tensors of a GPU are staged through pinned host memory, and a
    thread of the channel's own hands them over once they have been copied.

    Args:
        shape: rows of one micro-batch at this end over all peers, then the shape of one row.
        slots: micro-batches per iteration.
        limit: root mean square of a sound message; None: what arrives isn't checked.
        clock: this rank's; where it records, waits are named by the peer.

    Attributes:
        tolerant: note UEs whose messages aren't sound in `bad` and put zeros for them, instead of
            an error.
        bad: those UEs, with what was wrong.
        window: sends under way before `send` waits for the oldest; bounds what is kept for them.
    """

    def __init__(
        self,
        kind: Kind,
        peers: Sequence[Peer],
        shape: tuple[int, ...],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        ledger: Ledger | None = None,
        group: dist.ProcessGroup | None = None,
        limit: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.kind = kind
        self.peers = peers
        self.shape = shape
        self.slots = self.window = slots
        self.dtype = dtype
        self.device = device
        self.ledger = ledger if kind in COUNTED else None
        self.group = group
        self.limit = limit
        self.clock = Clock() if clock is None else clock
        self.tolerant = False
        self.bad: dict[int, str] = {}
        staged = device.type != "cpu" and dist.get_backend(group) != "nccl"
        self._thread = ThreadPoolExecutor(1) if staged else None
        self._buffers: list[Tensor] = []
        self._uploaded: dict[int, Callable[[], None]] = {}
        self._receives: dict[int, list[dist.Work]] = {}
        self._sends: deque[_Works | Future[_Works]] = deque()
        self._ahead = slots

    def post(self, ahead: int | None = None) -> None:
        """Post the receives of an iteration's first micro-batches; `release` posts the others.

        Args:
            ahead: how many micro-batches are received before the first is released; None: all.
        """
        self._ahead = min(self.slots if ahead is None else ahead, self.slots)
        while len(self._buffers) < self._ahead:
            self._buffers.append(self._buffer())
        for m in range(self._ahead):
            self._post(m)

    def receive(self, m: int) -> Tensor:
        """Micro-batch `m` on the device, of `shape`. Valid until it is released.

        Raises:
            PeerLost: a peer is gone, or silent for longer than the group's timeout.
            BadMessage: what it sent isn't sound.
        """
        buffer = self._buffers[m % self._ahead]
        for peer, work in zip(self.peers, self._receives.pop(m), strict=True):
            with self._receiving(m, peer):
                if self.clock.recorder is None:
                    work.wait()
                else:
                    self.clock.recorder.within(f"wait for {peer.role}", work.wait)
            self._count(peer, buffer)
            if self.limit is not None and not trust.sound(buffer[peer.rows], self.limit):
                self._judge(m, peer, buffer[peer.rows], self.limit)
        if self._thread is None:
            return buffer
        tensor, self._uploaded[m % self._ahead] = upload(buffer, self.device)
        return tensor

    def release(self, m: int) -> None:
        """Nobody needs what `receive` returned for `m` any more: its buffer takes another."""
        if m + self._ahead < self.slots:
            self._post(m + self._ahead)

    def send(self, m: int, tensor: Tensor) -> None:
        """Send micro-batch `m`, of `shape`, without waiting; `finish` waits.

        Raises:
            PeerLost: as `receive`.
        """
        assert tensor.shape == self.shape, (self.kind, tuple(tensor.shape), self.shape)
        while len(self._sends) >= self.window:
            self._settle()
        tensor = tensor.detach().to(self.dtype)
        if self._thread is None:
            self._sends.append(self._start(m, tensor.contiguous()))
        else:
            self._sends.append(self._thread.submit(self._start, m, *download(tensor)))
        for peer in self.peers:
            self._count(peer, tensor)

    def finish(self) -> None:
        """Wait for the sends since the last `finish`; raises as `receive`."""
        while self._sends:
            self._settle()

    def _start(
        self, m: int, tensor: Tensor, downloaded: Callable[[], None] | None = None
    ) -> _Works:
        """Hand a host (NCCL: device) tensor over to the group once it is there."""
        if downloaded is not None:
            downloaded()
        works = []
        for peer in self.peers:
            with self._sending(peer):
                work = dist.isend(tensor[peer.rows], peer.rank, self.group, self._tag(m))
            assert work is not None
            works.append((work, peer, tensor))  # the tensor must live until it is sent
        return works

    def _settle(self) -> None:
        """Wait for the oldest send under way."""
        works = self._sends.popleft()
        for work, peer, _ in works.result() if isinstance(works, Future) else works:
            with self._sending(peer):
                work.wait()

    def _post(self, m: int) -> None:
        place = m % self._ahead
        if place in self._uploaded:  # the device may still be reading from it
            self._uploaded.pop(place)()
        if self.limit is not None:
            for peer in self.peers:
                for share in self._shares(peer, self._buffers[place][peer.rows]):
                    trust.mark(share)
        self._receives[m] = [self._irecv(self._buffers[place][p.rows], p, m) for p in self.peers]

    def _judge(self, m: int, peer: Peer, rows: Tensor, limit: float) -> None:
        """Find the UEs whose share of a message isn't sound."""
        ues = peer.ues if self.from_ues else range(0)
        for ue, share in zip(ues, self._shares(peer, rows), strict=False):
            if not trust.sound(share, limit):
                who = f"{self._name(m)} from UE {ue} ({peer.role}) {trust.fault(share, limit)}"
                if not self.tolerant:
                    raise trust.BadMessage(f"{who}; train.on_bad_ue is stop.")
                self.bad.setdefault(ue, who)
                share.zero_()
        if not ues:
            raise trust.BadMessage(f"{self._name(m)} from {peer.role} {trust.fault(rows, limit)}.")

    def _shares(self, peer: Peer, rows: Tensor) -> Sequence[Tensor]:
        """A message's rows by UE, where UEs sent it."""
        return rows.chunk(len(peer.ues)) if self.from_ues and peer.ues else [rows]

    @property
    def from_ues(self) -> bool:
        """Whether what arrives here was sent by UEs, each its share of the rows."""
        return self.kind in UP

    def _buffer(self) -> Tensor:
        if self._thread is not None or self.device.type == "cpu":
            return host_buffer(self.shape, self.dtype).zero_()
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def _irecv(self, rows: Tensor, peer: Peer, m: int) -> dist.Work:
        with self._receiving(m, peer):  # a peer that is gone may show here already
            work = dist.irecv(rows, peer.rank, self.group, self._tag(m))
        assert work is not None
        return work

    def _receiving(self, m: int, peer: Peer) -> AbstractContextManager[None]:
        name = self._name(m)
        return watch(f"waiting for {name} from {peer.role}", peer.rank, name)

    def _sending(self, peer: Peer) -> AbstractContextManager[None]:
        name = self._name()
        return watch(f"sending {name} to {peer.role}", peer.rank, f"it to take {name}")

    def _tag(self, m: int) -> int:
        return self.kind.value * _SLOTS + m

    def _name(self, m: int | None = None) -> str:
        name = _NAMES.get(self.kind, self.kind.name.lower().replace("_", " "))
        return name if m is None or self.slots == 1 else f"{name} of micro-batch {m}"

    def _count(self, peer: Peer, tensor: Tensor) -> None:
        if self.ledger is not None:
            self.ledger.count(self.kind, peer.ues, tensor[peer.rows])


class Wire:
    """Builds this rank's channels; knows who talks to whom about what.

    Args:
        rows: rows of one UE in one micro-batch.
        micro_batches: micro-batches per iteration.
        dtype: type of what crosses (figures are float64 whatever it is).
        limit: root mean square above which what crosses isn't sound.

    Attributes:
        terms: a line for every kind of message that one of this rank's UEs, or the BTS with a UE,
            exchanges; both ends must have the same ones.
        clock: counts this rank's time.
    """

    def __init__(
        self,
        topology: Topology,
        rank: int,
        rows: int,
        micro_batches: int,
        dtype: torch.dtype,
        device: torch.device,
        limit: float,
    ) -> None:
        self.limit = limit
        self.terms: set[str] = set()
        self.topology = topology
        self.rank = rank
        self.rows = rows
        self.micro_batches = micro_batches
        self.dtype = dtype
        self.device = device
        self.ledger = Ledger(topology.ues)
        self.clock = Clock()

    def link(self, kind: Kind, width: int) -> Channel:
        """Messages between UEs and a BTS stage, `width` scalars per row, ordered by UE number."""
        peers = self._across(kind, self.rows)
        for peer in peers:
            self.expect(kind, peer.ues, (self.rows, width), self.micro_batches)
        return Channel(
            kind,
            peers,
            (peers[-1].rows.stop, width),
            self.micro_batches,
            self.dtype,
            self.device,
            self.ledger,
            limit=self.limit,
            clock=self.clock,
        )

    def expect(self, kind: Kind, ues: range, shape: tuple[int, int], messages: int) -> None:
        """Note messages that each of `ues` exchanges with the BTS, `messages` per iteration."""
        rows, width = shape
        for ue in ues:
            self.terms.add(
                f"UE {ue}: {messages} × {kind.name.lower()} of {rows} × {width} {self.dtype}"
            )

    def reports(self, width: int) -> Channel:
        """Figures of every UE, `width` each, to rank 0: float64, on the host."""
        peers = self._across(Kind.REPORT, 1)
        return self._host_channel(Kind.REPORT, peers, (peers[-1].rows.stop, width))

    def announcements(self, kind: Kind, source: int, numbers: int) -> Channel:
        """Some numbers from rank `source` to every other rank: float64, on the host."""
        others = [rank for rank in range(self.topology.world_size) if rank != source]
        ranks = others if self.rank == source else [source]
        return self._host_channel(kind, [self._peer(rank, numbers) for rank in ranks], (numbers,))

    def weights(self, rank: int, scalars: int) -> Channel:
        """Flattened weights that `rank` has, between that rank and rank 0.

        Any number will do as long as it is one: BatchNorm counts its batches among them.
        """
        other = 0 if self.rank else rank
        channel = self._host_channel(Kind.WEIGHTS, [self._peer(other, scalars)], (scalars,))
        channel.limit = sys.float_info.max
        return channel

    def neighbour(
        self, kind: Kind, stage: int, shape: tuple[int, ...], group: dist.ProcessGroup
    ) -> Channel:
        """Activations or their gradients, `shape` per row, between this stage and `stage`."""
        rows = self.rows * self.topology.ues
        return Channel(
            kind,
            [self._peer(stage, rows)],
            (rows, *shape),
            self.micro_batches,
            self.dtype,
            self.device,
            group=group,
            clock=self.clock,
        )

    def vector(self, kind: Kind, scalars: int, ues: range) -> Channel:
        """A vector of (1, scalars) between the BTS and each of `ues`: the same one, going down."""
        at_bts = self.topology.is_bts(self.rank)
        ranks = [self.topology.host(ue) if at_bts else 0 for ue in ues]
        peers = [
            self._peer(rank, 1, range(ue, ue + 1)) for rank, ue in zip(ranks, ues, strict=True)
        ]
        self.expect(kind, ues, (1, scalars), 1)
        return Channel(
            kind,
            peers,
            (1, scalars),
            1,
            self.dtype,
            self.device,
            self.ledger,
            limit=self.limit,
            clock=self.clock,
        )

    def vectors(self, sizes: Mapping[Kind, int], ue: int, tolerant: bool) -> list[Tensor] | str:
        """At the BTS: what a UE sends, (1, scalars) of each kind; or what is wrong with it.

        Args:
            tolerant: as `Channel.tolerant`; else an error.
        """
        channels = [self.vector(kind, size, range(ue, ue + 1)) for kind, size in sizes.items()]
        for channel in channels:
            channel.tolerant = tolerant
            channel.post()
        tensors = [channel.receive(0) for channel in channels]
        faults = [text for channel in channels for text in channel.bad.values()]
        return faults[0] if faults else tensors

    def _across(self, kind: Kind, rows: int) -> list[Peer]:
        """The other side of the UE–BTS boundary, `rows` per UE."""
        topology = self.topology
        if topology.is_bts(self.rank):
            return [
                Peer(rank, slice(ues.start * rows, ues.stop * rows), ues, topology.role(rank))
                for rank in topology.ue_ranks
                for ues in [topology.ues_of(rank)]
            ]
        ues = topology.ues_of(self.rank)
        stage = topology.last_stage if kind in _LAST_STAGE else 0
        return [self._peer(stage, len(ues) * rows, ues)]

    def _peer(self, rank: int, rows: int, ues: range = range(0)) -> Peer:
        """The only peer of a channel."""
        return Peer(rank, slice(0, rows), ues, self.topology.role(rank))

    @staticmethod
    def _host_channel(kind: Kind, peers: list[Peer], shape: tuple[int, ...]) -> Channel:
        return Channel(kind, peers, shape, 1, torch.float64, torch.device("cpu"))


def merged(ledger: Ledger, is_bts: bool) -> Ledger:
    """The UEs' ledger, summed over all ranks; collective.

    Raises:
        RuntimeError: the BTS's side counted something else.
    """
    sides = torch.zeros(2, *ledger.counts.shape, dtype=torch.int64)
    sides[int(is_bts)] = ledger.counts
    with watch("comparing ledgers with all ranks", EVERYONE, "their ledgers"):
        dist.all_reduce(sides)
    if not torch.equal(sides[0], sides[1]):
        raise RuntimeError("the UEs' and the BTS's ledgers differ: a message was lost.")
    found = Ledger(ledger.counts.shape[2])
    found.counts = sides[0]
    return found


def largest(values: Sequence[int]) -> list[int]:
    """Element-wise maximum over all ranks; collective."""
    tensor = torch.tensor(values, dtype=torch.int64)
    with watch("agreeing with all ranks", EVERYONE, "what they say"):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def total(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place, of a tensor on the host; collective.

    Exact where each element is a number on one rank and zero on the others.
    """
    with watch("adding up over all ranks", EVERYONE, "what they found"):
        dist.all_reduce(values)
    return values


def connect_stages(rank: int, stages: int, device: torch.device, group: dist.ProcessGroup) -> None:
    """Connect neighbouring stages, pair by pair.

    NCCL connects two ranks at their first transfer and holds both up until it has; met in another
    order than the neighbour's, two stages would wait for each other for ever.
    """
    greeting = torch.zeros(1, device=device if dist.get_backend(group) == "nccl" else "cpu")
    for stage in range(stages - 1):
        if rank == stage:
            dist.send(greeting, stage + 1, group)
        elif rank == stage + 1:
            dist.recv(greeting, stage, group)
