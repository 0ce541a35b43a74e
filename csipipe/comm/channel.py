"""One kind of message between this rank and its peers: encoded, posted, checked, counted.

A message carries the rows of one micro-batch that one rank owns; its tag says which kind of
message and which micro-batch it is, so that a smashed-data tensor can't be taken for a gradient.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from csipipe.comm import patience, trust
from csipipe.comm.blame import watch
from csipipe.comm.codec import Codec, Residual, Rounding
from csipipe.comm.ledger import COUNTED, UP, Kind, Ledger
from csipipe.comm.loopback import Loopback
from csipipe.comm.patience import Work
from csipipe.device import download, host_buffer, upload
from csipipe.measure.clock import Clock

_NAMES = {Kind.SMASHED: "smashed data", Kind.OUTPUT: "tail output"}
_ALL = 1 << 20  # nobody's number: owns a message that all UEs get
SLOTS = 1 << 20
"""Tags: kind * SLOTS + micro-batch."""


@dataclass(frozen=True)
class Peer:
    """The other end of a channel: its rank, its rows of every micro-batch, whose, and its role.

    Attributes:
        loop: how this rank reaches itself, where it is the other end; None: it is another rank.
    """

    rank: int
    rows: slice
    ues: Sequence[int] = ()
    role: str = ""
    loop: Loopback | None = None


_Works = list[tuple[Work, Peer, Tensor]]


class Channel:
    """Messages of one kind between this rank and its peers, one per micro-batch.

    Made by `Wire`. Receives are posted ahead into a ring of buffers, sends are not waited for.
    Unless the group is NCCL's, tensors of a GPU are staged through pinned host memory, and a
    thread of the channel hands them over once they have been copied.

    Args:
        shape: rows of one micro-batch at this end over all peers, then the shape of one row.
        slots: micro-batches per iteration.
        codec: how a message is written.
        limit: root mean square of a sound message; None: what arrives isn't checked.
        clock: this rank's; when it records, waits are named after the peer.
        timeout: longest wait for a message if the group is NCCL's, which doesn't end a wait itself.
        rounding: the noise with which messages are encoded; None: none.

    Attributes:
        noise: standard deviation of Gaussian noise that is added to what is sent, over the root
            mean square of a UE's share.
        residual: what the messages that were sent in training have lost, if that is made up for.
        tolerant: instead of raising an error, note UEs whose messages aren't sound in `bad` and
            replace their values by zeros.
        bad: those UEs, with what was wrong.
        window: sends in flight before `send` waits for the oldest; bounds the memory for them.
    """

    def __init__(
        self,
        kind: Kind,
        peers: Sequence[Peer],
        shape: tuple[int, ...],
        slots: int,
        codec: Codec,
        device: torch.device,
        ledger: Ledger | None = None,
        group: dist.ProcessGroup | None = None,
        limit: float | None = None,
        clock: Clock | None = None,
        timeout: float | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        self.kind = kind
        self.peers = peers
        self.shape = shape
        self.slots = self.window = slots
        self.codec = codec
        self.rounding = Rounding(0, stochastic=False) if rounding is None else rounding
        self.residual: Residual | None = None
        self.noise = 0.0
        self.device = device
        self.ledger = ledger if kind in COUNTED else None
        self.group = group
        self.limit = limit
        self.clock = Clock() if clock is None else clock
        self.tolerant = False
        self.bad: dict[int, str] = {}
        elsewhere = any(peer.loop is None for peer in peers)
        nccl = device.type != "cpu" and elsewhere and dist.get_backend(group) == "nccl"
        self._timeout = timeout if nccl else None
        staged = device.type != "cpu" and elsewhere and not nccl
        # a thread starts on GPU 0, where its work would cost memory for a second context
        self._thread = (
            ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))
            if staged
            else None
        )
        self._memory: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._uploaded: dict[int, Callable[[], None]] = {}
        self._receives: dict[int, list[Work]] = {}
        self._sends: deque[_Works | Future[_Works]] = deque()
        self._ahead = slots

    def lay(self, peers: Sequence[Peer]) -> None:
        """From now on exchange with these peers, whose rows make up a micro-batch.

        Nothing is under way: all ends of the channel do so between two iterations.
        """
        assert not self._receives, self.kind
        assert not self._sends, self.kind
        self.peers = peers
        self.shape = (rows_of(peers), *self.shape[1:])

    def post(self, ahead: int | None = None) -> None:
        """Post the receives of an iteration's first micro-batches; `release` posts the others.

        Args:
            ahead: how many micro-batches are received before the first is released; None: all.
        """
        self._ahead = min(self.slots if ahead is None else ahead, self.slots)
        self._memory += [self._buffer() for _ in range(self._ahead - len(self._memory))]
        rows = self.codec.shape(self.shape)[0]
        for m in range(self._ahead):
            if len(self._memory[m]) < rows:
                self._memory[m] = self._buffer()
        self._buffers = [memory[:rows] for memory in self._memory]
        for m in range(self._ahead):
            self._post(m)

    def receive(self, m: int) -> Tensor:
        """Micro-batch `m` on the device, of `shape`. Valid until it is released.

        Raises:
            PeerLost: a peer is gone, or silent for longer than the group's timeout.
            BadMessage: what it sent isn't sound.
        """
        payload = self._buffers[m % self._ahead]
        for peer, work in zip(self.peers, self._receives.pop(m), strict=True):
            with self._receiving(m, peer):
                if self.clock.recorder is None:
                    patience.wait(work, self._timeout)
                else:
                    wait = partial(patience.wait, work, self._timeout)
                    self.clock.recorder.within(f"wait for {peer.role}", wait)
            self._count(peer, payload)
        message = self.codec.decode(payload)
        if self.limit is not None:
            for peer in self.peers:
                if not trust.sound(message[peer.rows], self.limit):
                    self._judge(m, peer, message[peer.rows], self._of(peer, payload), self.limit)
        if self._thread is None:
            return message
        tensor, self._uploaded[m % self._ahead] = upload(message, self.device)
        return tensor

    def release(self, m: int) -> None:
        """What `receive` returned for `m` is no longer needed: reuse its buffer."""
        if m + self._ahead < self.slots:
            self._post(m + self._ahead)

    def send(self, m: int, tensor: Tensor) -> Tensor:
        """Send micro-batch `m`, of `shape`, without waiting; `finish` waits.

        Returns:
            The payload, which mustn't change meanwhile.

        Raises:
            PeerLost: as `receive`.
        """
        assert tensor.shape == self.shape, (self.kind, tuple(tensor.shape), self.shape)
        while len(self._sends) >= self.window:
            self._settle()
        payload = self._encode(m, tensor.detach())
        if self._thread is None:
            self._sends.append(self._start(m, payload))
        else:
            self._sends.append(self._thread.submit(self._start, m, *download(payload)))
        for peer in self.peers:
            self._count(peer, payload)
        return payload

    def finish(self) -> None:
        """Wait for the sends since the last `finish`; raises as `receive`."""
        while self._sends:
            self._settle()

    def _encode(self, m: int, message: Tensor) -> Tensor:
        """The payload of micro-batch `m`, with what the messages before have lost."""
        if self.noise:
            message = self.rounding.blur(message, self.noise, self.kind.value, m, self._owners())
        noise = None
        if self.codec.rounds:
            owners, shares = self._owners(), len(message) // self.codec.share
            owners = owners if len(owners) == shares else [_ALL]  # all UEs get the same
            noise = self.rounding.noise(self.kind.value, m, owners, message.numel() // shares)
        if self.residual is None or self.rounding.iteration is None:
            return self.codec.encode(message, noise)
        message = self.residual.add(message)
        payload = self.codec.encode(message, noise)
        self.residual.keep(message, self.codec.decode(payload))
        return payload

    def _owners(self) -> list[int]:
        """UEs whose rows a message holds, in order."""
        return [ue for peer in self.peers for ue in peer.ues]

    def _start(
        self, m: int, tensor: Tensor, downloaded: Callable[[], None] | None = None
    ) -> _Works:
        """Hand a host (NCCL: device) tensor over to the group once it is there."""
        if downloaded is not None:
            downloaded()
        works: _Works = []  # with the tensor, which must live until it is sent
        for peer in self.peers:
            with self._sending(peer):
                works.append((self._isend(self._of(peer, tensor), peer, m), peer, tensor))
        return works

    def _settle(self) -> None:
        """Wait for the oldest send in flight."""
        works = self._sends.popleft()
        for work, peer, _ in works.result() if isinstance(works, Future) else works:
            with self._sending(peer):
                patience.wait(work, self._timeout)

    def _post(self, m: int) -> None:
        place = m % self._ahead
        if place in self._uploaded:  # the device may still be reading from it
            self._uploaded.pop(place)()
        if self.limit is not None:
            # a message of this rank to itself has the agreed length, or the loop refuses it
            for peer in (peer for peer in self.peers if peer.loop is None):
                for share in self._shares(peer, self._of(peer, self._buffers[place])):
                    trust.mark(share)
        self._receives[m] = [
            self._irecv(self._of(peer, self._buffers[place]), peer, m) for peer in self.peers
        ]

    def _judge(self, m: int, peer: Peer, rows: Tensor, payload: Tensor, limit: float) -> None:
        """Find the UEs whose share of a message isn't sound."""
        ues = peer.ues if self.from_ues else ()
        sent = self._shares(peer, payload)
        for ue, share, part in zip(ues, self._shares(peer, rows), sent, strict=False):
            if not trust.sound(share, limit):
                who = f"{self._name(m)} from UE {ue} ({peer.role}) {trust.fault(share, limit)}"
                who += trust.unended(part)
                if not self.tolerant:
                    raise trust.BadMessage(f"{who}; train.on_bad_ue is stop.")
                self.bad.setdefault(ue, who)
                share.zero_()
        if not ues:
            raise trust.BadMessage(f"{self._name(m)} from {peer.role} {trust.fault(rows, limit)}.")

    def _of(self, peer: Peer, payload: Tensor) -> Tensor:
        """What crosses between this rank and one of its peers."""
        share = self.codec.share
        return payload[peer.rows.start // share : peer.rows.stop // share]

    def _shares(self, peer: Peer, rows: Tensor) -> Sequence[Tensor]:
        """A message's rows, or its payload's, by UE, where UEs sent it."""
        return rows.chunk(len(peer.ues)) if self.from_ues and peer.ues else [rows]

    @property
    def from_ues(self) -> bool:
        """Whether what arrives here was sent by UEs, each its share of the rows."""
        return self.kind in UP

    def _buffer(self) -> Tensor:
        shape, dtype = self.codec.shape(self.shape), self.codec.dtype
        if self._thread is not None or self.device.type == "cpu":
            return host_buffer(shape, dtype, self.device).zero_()
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _isend(self, rows: Tensor, peer: Peer, m: int) -> Work:
        if peer.loop is not None:
            return peer.loop.isend(rows, self._tag(m))
        work = dist.isend(rows, peer.rank, self.group, self._tag(m))
        assert work is not None
        return work

    def _irecv(self, rows: Tensor, peer: Peer, m: int) -> Work:
        if peer.loop is not None:
            return peer.loop.irecv(rows, self._tag(m))
        with self._receiving(m, peer):  # a peer that is gone may already be noticed here
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
        return self.kind.value * SLOTS + m

    def _name(self, m: int | None = None) -> str:
        name = _NAMES.get(self.kind, self.kind.name.lower().replace("_", " "))
        return name if m is None or self.slots == 1 else f"{name} of micro-batch {m}"

    def _count(self, peer: Peer, payload: Tensor) -> None:
        if self.ledger is not None:
            rows = peer.rows.stop - peer.rows.start
            scalars, bytes_ = rows * math.prod(self.shape[1:]), self._of(peer, payload).nbytes
            self.ledger.count(self.kind, peer.ues, scalars, bytes_)


def rows_of(peers: Sequence[Peer]) -> int:
    """Rows of a micro-batch at this end."""
    return max((peer.rows.stop for peer in peers), default=0)


@dataclass(frozen=True)
class Ports:
    """What a BTS stage, or the UEs of a rank, receive and send: forward and backward."""

    forward_in: Channel
    forward_out: Channel
    backward_in: Channel
    backward_out: Channel
