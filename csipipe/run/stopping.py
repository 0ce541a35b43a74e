"""A run that is asked to stop: all ranks end after the same iteration, with everything saved.

A run is stopped by Ctrl-C, by SIGTERM, SIGUSR1 or SIGHUP (a closed terminal, a lost ssh) to any
rank, or by a file called `stop` in its directory. Rank 0 then names the iteration after its current
one. No rank can be further, since each needs messages from rank 0 in every iteration; so all of
them read the name in time, by looking into the store once per iteration.

A signal may also mean that torchrun is ending everything because a rank died. A rank that waits
for the dead one doesn't run Python's handlers; so signals wake a thread, which ends a rank that
makes no progress, and which a second Ctrl-C reaches even then.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from csipipe.comm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
STOP_FILE = "stop"
GRACE = 5.0
"""Seconds beyond the longest iteration so far after which a signalled rank ends."""
_TWICE = 1.0
"""Seconds after a signal from which on Ctrl-C is another one, not the same by way of torchrun."""
_LOOK = 0.5  # seconds between two looks for the file
_ASKED, _AFTER = "stop asked", "stop after"


class Stopping:
    """Listens for requests to stop while it is entered; afterwards signals do what they did before.

    Args:
        folder: the run's directory.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self._file = folder / STOP_FILE
        self._signal: int | None = None
        self._after: int | None = None
        self._told = False
        self._looked = 0.0
        self._progress = time.monotonic()
        self._longest = 0.0
        self._unhurried = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        self._progress = time.monotonic()
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(target=self._watch, args=(self._reading,), daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._writing = writing
        # under nohup SIGHUP is ignored already, and shall be
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, _ignore) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            if number != signal.SIGINT or self._signal is None:  # it may come twice
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writing)  # ends the thread

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """Work of unknown length, unlike an iteration: an evaluation or a save. Waits inside it
        are limited by `run.timeout`.
        """
        self._unhurried = True
        try:
            yield
        finally:
            self._progress = time.monotonic()
            self._unhurried = False

    def after(self, done: int) -> bool:
        """The `done`-th iteration is over: whether the run ends with it, the same on every rank."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._progress)
        self._progress = now
        if self._world.rank == 0:
            if self._after is None and self._wanted():
                self._after = done + 1
                self._world.store.set(_AFTER, str(self._after))
        else:
            if self._signal is not None and not self._told:
                self._world.store.set(_ASKED, "")
                self._told = True
            if self._after is None and self._world.store.check([_AFTER]):
                self._after = int(self._world.store.get(_AFTER))
        return self.ends(done)

    def ends(self, done: int) -> bool:
        """Whether it is known by now that the run ends with the `done`-th iteration."""
        return self._after is not None and done >= self._after

    def answered(self) -> None:
        """On rank 0, when the run has stopped: remove the file."""
        self._file.unlink(missing_ok=True)

    def _wanted(self) -> bool:
        if self._signal is not None or self._world.store.check([_ASKED]):
            return True
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return False
        self._looked = now
        return self._file.exists()

    def _watch(self, reading: int) -> None:
        """Wait for a signal, then for the end or for a standstill."""
        wanted = {int(number) for number in SIGNALS}
        while self._signal is None:
            numbers = os.read(reading, 64)
            if not numbers:
                os.close(reading)
                return
            self._signal = next((number for number in numbers if number in wanted), None)
        since = time.monotonic()
        if self._signal == signal.SIGINT:
            self._say(
                "interrupted: one more iteration, and all is saved; Ctrl-C again ends at once"
            )
        os.set_blocking(reading, False)
        while True:
            try:
                numbers = os.read(reading, 64)
                if not numbers:
                    os.close(reading)
                    return
                if self._again(numbers) and time.monotonic() > since + _TWICE:
                    place = shlex.quote(str(self._file.parent))
                    self._say(
                        f"ended; the same command and --run.dir {place} resumes what is saved"
                    )
                    time.sleep(_LOOK if self._world.rank else 0)  # without it, rank 0 would fail
                    os._exit(130)
            except BlockingIOError:
                time.sleep(0.1)
            idle = time.monotonic() - max(since, self._progress)
            if idle > GRACE + self._longest and not self._unhurried:
                name = signal.Signals(self._signal).name
                print(
                    f"csipipe: rank {self._world.rank} exits: no progress {idle:.0f} s after "
                    f"{name}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def _again(self, numbers: bytes) -> bool:
        """Whether signals are a second Ctrl-C; torchrun passes it on as SIGTERM."""
        both = signal.SIGINT in (self._signal, *numbers)
        return both and (signal.SIGINT in numbers or signal.SIGTERM in numbers)

    def _say(self, text: str) -> None:
        """On rank 0, for all; a progress bar may be on the line."""
        if self._world.rank == 0:
            print(f"\ncsipipe: {text}", file=sys.stderr, flush=True)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread has it already."""
