"""The processes of one run: how they find each other, start together and end together.

Start: every rank connects to torchrun's key-value store (rank 0 holds it where DeepSpeed's launcher
started them), agrees with the others which attempt this is, sets itself up, and waits for them in
`Texts.ready`. End: a rank that fails publishes its error in the store before it exits. The first
one to publish shows its error; the others exit silently, since their own errors (a closed
connection, a timeout) only follow from the first. A rank that gave up waiting publishes whom it
waited for, and names the rank at the end of the chain: its neighbour may be waiting as well, only
not for as long yet. So a thread of every rank checks regularly whether one gave up, and if so
publishes whom its own rank waits for; a frozen process can't.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, NoReturn

import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # missing in its stub
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from csipipe.comm import blame, meeting, orphans
from csipipe.comm.texts import LOOK, POLL, Texts, peek
from csipipe.files import in_words

HELLO = 300.0
"""Longest wait for a rank that was started and hasn't said hello: it imports, or is frozen."""
_SPEAKING = 3.0
_GRACE = 4.0  # a rank that also waits publishes it after `LOOK`; on a busy machine, later
_LOCAL_SIZE = {"torchrun": "LOCAL_WORLD_SIZE", "deepspeed": "LOCAL_SIZE"}
_GRACE_GONE = 0.5  # a rank whose connection breaks because it gave up publishes it at once


@dataclass
class World(Texts):
    """One rank's view of the run; other attributes as `Texts`.

    Attributes:
        local_rank, local_size: as `rank` and `size`, on this node.
        holds_store: the store ends with this process, which is therefore the last one to end.
        doing: what this rank is, for messages; empty before it has a role.
        grace: how long a rank that gave up checks whether its peer waits too, in seconds.
    """

    local_rank: int
    local_size: int
    holds_store: bool = False
    doing: str = ""
    grace: float = _GRACE
    _left: threading.Event = field(default_factory=threading.Event, init=False)
    _attending: threading.Thread | None = field(default=None, init=False)

    @classmethod
    def launched(cls, by: Literal["torchrun", "deepspeed"]) -> World:
        """Connect to the other ranks that this launcher started.

        Raises:
            ValueError: the first node's name doesn't resolve.
            OSError: the store can't be reached; PeerLost, a rank did not arrive.
        """
        # Ctrl-C reaches every rank: avoid their tracebacks; while they train it is `Stopping`'s
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        meeting.resolve(os.environ["MASTER_ADDR"])
        try:
            store, rank, size = next(iter(rendezvous("env://")))
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
            reason = str(error).splitlines()[0]
            raise OSError(f"the ranks can't meet at {where}: {reason}") from error
        local = (int(os.environ["LOCAL_RANK"]), int(os.environ[_LOCAL_SIZE[by]]))
        orphans.watch(os.getppid(), by, speaks=local[0] == 0)
        if by == "deepspeed":  # never restarts
            return cls(store, rank, size, *local, holds_store=rank == 0)
        # a restarted run finds the same store, with what the last attempt left in it
        attempt = meeting.attempt(PrefixStore("meeting", store), rank, size, HELLO)
        mine, lasting = (PrefixStore(n, store) for n in (f"attempt {attempt}", "all attempts"))
        return cls(mine, rank, size, *local, lasting=lasting)

    @classmethod
    def alone(cls) -> World:
        """A run of one process that wasn't started by torchrun."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return cls(HashStore(), 0, 1, 0, 1)

    def connect(self, timeout: float) -> None:
        """Join the process group of all ranks (gloo, which every machine has).

        `timeout` is the longest wait for a peer, in seconds, on this group. Connecting takes as
        long as the slowest rank's imports, so it follows `ready`.

        Raises:
            PeerLost: a rank is frozen.
            OSError: ranks of a node give an address that no other node reaches.
        """
        self.attend()
        try:
            dist.init_process_group(
                "gloo",
                store=PrefixStore("world", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout),
            )
        except dist.DistError as error:  # doesn't say which
            for rank in self.lifeless():
                what, reason = "its connection", f"Timed out after {timeout:g} s"
                raise blame.PeerLost(f"waiting for {what}", rank, what, reason) from error
            raise
        except RuntimeError as error:  # gloo's own
            if self.size > self.local_size and (why := meeting.local_address(error)):
                raise OSError(why) from error
            raise

    def attend(self) -> None:
        """From here on, give signs of life, and say whom this rank waits for when one gives up."""
        if self.size == 1 or self._attending is not None:  # nobody waits for it
            return
        # a connection of its own: one that waits for an answer blocks others
        self._attending = threading.Thread(
            target=self._attend,
            args=(self.store.clone(),),  # type: ignore[attr-defined]  # missing in its stub
            daemon=True,
        )
        self._attending.start()

    def leave(self) -> None:
        """End together: no rank closes its connections while others still need them.

        Raises:
            PeerLost: a rank is gone, or didn't arrive within the group's timeout.
        """
        with blame.watch("ending with all ranks", blame.EVERYONE, "the others to end"):
            dist.barrier()
        self._hush()
        dist.destroy_process_group()

    def part(self) -> None:
        """This rank needs the others no more."""
        self._hush()
        self._linger()

    def _linger(self) -> None:
        """Where rank 0 holds the store, it ends when nobody needs that any more."""
        if self.lasting is not None or self.size == 1:
            return  # torchrun holds it, or nobody else is there
        with contextlib.suppress(RuntimeError):
            self.store.set(f"parted/{self.rank}", "")
            keys = [f"parted/{rank}" for rank in range(self.size)] if self.holds_store else []
            deadline = time.monotonic() + _SPEAKING
            while not self.store.check(keys) and time.monotonic() < deadline:
                time.sleep(POLL)

    def fail(self, error: BaseException, debug: bool) -> NoReturn:
        """Publish `error`, show it if no other rank did so before, and exit with status 1.

        Exits without tearing down the process group: destructors wait for peers that are gone.
        """
        orphans.leave()  # a store that went with its torchrun explains this error
        text = in_words(error) or type(error).__name__
        # before the first iteration it is about what the user said, and says all there is to say
        told = isinstance(error, ValueError) and self.doing in ("", self.role(self.rank))
        if not (told or isinstance(error, OSError)):
            text = f"{type(error).__name__}: {text}"
        if self.doing and not told:
            text = f"{self.doing}: {text}"
        if isinstance(error, blame.PeerLost):
            with contextlib.suppress(RuntimeError):
                text = self._blame(error)
        mine = f"rank {self.rank}: {text}"  # several ranks may find the same mistake
        # the store may be gone with its torchrun: then no other rank can show an error
        with contextlib.suppress(RuntimeError):
            if self.store.compare_set("failure", "", mine).decode() != mine:
                self._let_speak()
        if debug:
            traceback.print_exception(error)
        print(f"\ncsipipe: error: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            self.store.set("failure shown", "")
        self._exit()

    def _blame(self, lost: blame.PeerLost) -> str:
        """Name the rank at the end of the chain of waits, once the others could publish theirs."""
        doing = self.doing or self.role(self.rank)  # during set-up
        mine = blame.Wait(lost.peer, lost.what, lost.gone, doing)
        self._hush()
        self.store.set(f"waiting/{self.rank}", mine.to_json())
        self.store.set("gave up", "")
        started = time.monotonic()
        while True:
            if self.store.check(["failure"]):
                self._let_speak()
            said = {rank: peek(self.store, f"waiting/{rank}") for rank in range(self.size)}
            waits = {rank: blame.Wait.from_json(text) for rank, text in said.items() if text}
            verdict = blame.find(waits, self.rank, self.size, self.role)
            patience = _GRACE_GONE if verdict.gone else self.grace
            if verdict.final or time.monotonic() > started + patience:
                return verdict.text
            time.sleep(POLL)

    def _attend(self, store: Store) -> None:
        """A thread of its own: count seconds, and once a rank gave up, publish whom this one waits
        for.
        """
        pause = LOOK
        with contextlib.suppress(RuntimeError):  # the store may go with its torchrun
            for beat in itertools.count():
                store.set(f"alive/{self.rank}", str(beat))
                if self._left.wait(pause):
                    return
                if store.check(["gave up"]):
                    wait = blame.now(self.doing)
                    store.set(f"waiting/{self.rank}", wait.to_json() if wait else "")
                    pause = POLL

    def _hush(self) -> None:
        """Stop the thread that speaks for this rank."""
        self._left.set()
        if self._attending is not None:
            self._attending.join()

    def _let_speak(self) -> NoReturn:
        """Exit once the first failed rank has shown its error: torchrun ends all when one exits."""
        deadline = time.monotonic() + _SPEAKING
        while not self.store.check(["failure shown"]) and time.monotonic() < deadline:
            time.sleep(POLL)
        self._exit()

    def _exit(self) -> NoReturn:
        sys.stdout.flush()
        self._linger()
        os._exit(1)
