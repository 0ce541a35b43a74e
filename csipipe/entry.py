"""What all commands have in common: the shell's words, refusals, threads that leave cores to
others, and a screen that may not take everything.

A screen that can't take what is printed costs characters or lines, never a result.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable
from functools import wraps
from typing import Any

from csipipe.files import in_words

_Command = Callable[[list[str]], int]
"""Takes the arguments, returns the exit code."""

_SPINS = "10000"
"""Looks of an OpenMP thread at what it waits for, a fraction of a millisecond, before it sleeps:
the gaps between two operations. By default it spins for much longer, and keeps the thread that it
waits for from the core, if others compute there too."""


class _Raw(io.FileIO):
    """An open descriptor; when nobody reads it any more, or its disk is full, text is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lost = False

    def write(self, data: Any, /) -> int:
        try:
            if not self._lost:
                return super().write(data) or 0
        except OSError as error:
            self._lost = True
            if error.errno != errno.EPIPE:  # `… | head` asked for no more
                line = f"csipipe: what was printed is lost: {error.strerror}\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode())
        return len(data)


def start(main: _Command) -> int:
    """Run a command with this process's arguments; returns its exit code, whatever the screen.

    Characters that the screen's encoding doesn't have are replaced. After Ctrl-C it is 130.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before we started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the end
            continue
        replaced = io.TextIOWrapper(
            # of its own: the stream that is replaced may close its descriptor
            io.BufferedWriter(_Raw(os.dup(stream.fileno()))),
            encoding=stream.encoding,
            errors="replace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        stream.flush()
        setattr(sys, name, replaced)
    if "OMP_WAIT_POLICY" not in os.environ:  # read when PyTorch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    try:
        return main([_expanded(word) for word in sys.argv[1:]])
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            raise
        print("\ninterrupted", file=sys.stderr)
        return 130


def refusing(*errors: type[Exception]) -> Callable[[_Command], _Command]:
    """Makes a command say these errors in a line and return 1; with `--debug` they are raised."""

    def around(main: _Command) -> _Command:
        @wraps(main)
        def refusing_main(arguments: list[str]) -> int:
            try:
                return main(arguments)
            except errors as error:
                if "--debug" in arguments:
                    raise
                said = in_words(error)
                if isinstance(error, ArgumentError):  # jsonargparse's are broken into lines
                    said = " ".join(said.split())
                print(f"csipipe: error: {said}", file=sys.stderr)
                return 1

        return refusing_main

    return around


def _expanded(word: str) -> str:
    """`--option=~/…` as a shell would have expanded `--option ~/…`."""
    option, is_pair, value = word.partition("=")
    return f"{option}={os.path.expanduser(value)}" if is_pair and value[:1] == "~" else word
