"""Who started a process was killed: what becomes of the process.

A rank whose torchrun was killed ends, with one line per node. torchrun holds the key-value store,
so no rank can go on or tell another anything. Left alone, they would fail one by one, each with an
error that explains nothing. A torchrun whose report was killed is asked to end by the kernel.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

_LOOK = 0.2
_ENDING = 5.0
_ON_PARENTS_DEATH = 1
"""PR_SET_PDEATHSIG of Linux."""
_parent: int | None = None


def watch(parent: int, name: str, speaks: bool) -> None:
    """From here on, end this process as soon as its parent is gone.

    Args:
        parent: id of the process that started this one.
        name: what it is called, for the message.
        speaks: this rank says so.
    """
    global _parent
    _parent = parent
    threading.Thread(target=_wait, args=(parent, name, speaks), daemon=True).start()


def ending_with_parent() -> Callable[[], None]:
    """For `subprocess.Popen(preexec_fn=…)`: SIGTERM to the child when this process is gone.

    Also if it is killed and can end nothing itself. Only Linux does that; call it in the main
    thread, whose end counts.
    """
    libc, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(_ON_PARENTS_DEATH, int(signal.SIGTERM))
            if os.getppid() != parent:  # it was faster
                os.kill(os.getpid(), signal.SIGTERM)

    return ask


def leave() -> None:
    """If the parent is gone, wait here for the end that is near; otherwise do nothing."""
    if _parent is not None and os.getppid() != _parent:
        time.sleep(_ENDING)


def _wait(parent: int, name: str, speaks: bool) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except (AttributeError, OSError):  # an old kernel, or gone already
        while os.getppid() == parent:
            time.sleep(_LOOK)
    else:
        # readable when it has ended; select would refuse large descriptors
        end = select.poll()
        end.register(descriptor, select.POLLIN)
        end.poll()
    if speaks:
        print(
            f"\ncsipipe: error: {name}, which started this run, is gone (killed?), and the ranks "
            "can't go on without it. The same command with this run's --run.dir resumes it.",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)
