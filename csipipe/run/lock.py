"""One live run per directory: a lock that a dead process doesn't hold.

The kernel releases an flock when its process dies. Where the file system keeps flocks to one node,
the file's modification time helps: a live run renews it, and a run on another node watches it for
a while. On a file system without locks, nothing prevents two runs.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from csipipe import files

NAME = "lock"
BEAT = 5.0
"""Seconds between two signs of life."""
WATCH = 3 * BEAT
"""Seconds for which a lock that names another node is watched."""


class Lock:
    """Holds the lock of a run's directory until `release`, or until this process ends.

    Raises:
        ValueError: a live run holds it; process, node and time are named.
        OSError: the directory can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(self._descriptor, self._file)
            self._wait_for_another_node()
            now = datetime.now().isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": platform.node(), "since": now}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Release the lock."""
        self._ended.set()
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                os.utime(self._file)
            except OSError:  # a full or missing disk is reported elsewhere
                continue

    def _wait_for_another_node(self) -> None:
        holder = _holder(self._file)
        if holder.get("host") in (None, platform.node()):
            return
        print(
            f"csipipe: {self._file.parent} was used by process {holder.get('pid', '?')} on "
            f"{holder.get('host')}; waiting {WATCH:g} s for a sign of life",
            file=sys.stderr,
            flush=True,
        )
        before, deadline = self._file.stat().st_mtime, time.monotonic() + WATCH
        while time.monotonic() < deadline:
            time.sleep(BEAT / 5)
            if self._file.stat().st_mtime != before:
                raise _in_use(self._file)


def check(folder: Path) -> None:
    """Refuse (ValueError) a directory that a live run holds, as far as flocks tell."""
    file = folder / NAME
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        _take(descriptor, file)
    finally:
        os.close(descriptor)


def live(folders: Iterable[Path]) -> list[Path]:
    """Those of `folders` with a run in progress; locks of other nodes are watched for a while."""
    held, watched = [], dict[Path, float]()
    for folder in folders:
        try:
            check(folder)
        except ValueError:
            held.append(folder)
            continue
        if _holder(folder / NAME).get("host") not in (None, platform.node()):
            watched[folder] = (folder / NAME).stat().st_mtime
    if watched:
        time.sleep(BEAT + 1)
    return [*held, *(f for f, before in watched.items() if (f / NAME).stat().st_mtime != before)]


def _take(descriptor: int, file: Path) -> None:
    if not files.lock(descriptor):
        raise _in_use(file)


def _in_use(file: Path) -> ValueError:
    holder = _holder(file)
    return ValueError(
        f"run.dir: {file.parent} is in use by a live run (process {holder.get('pid', '?')} on "
        f"{holder.get('host', '?')}, since {holder.get('since', '?')}); wait for it, stop it with "
        f"`touch {shlex.quote(str(file.parent / 'stop'))}`, or choose another run.dir."
    )


def _holder(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
