"""TensorBoard's event files: written immediately, never read.

Other writers use a queue and a thread. This one doesn't: a point costs less than handing it over,
its cost is this rank's alone and can be counted, and a full disk is an error here and not in a
thread.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

_number = count()


class Events:
    """One event file in a folder, beside any others.

    A file that can't be written is reported once and ends the curves, not the run.

    Args:
        first: the first step to come. Readers discard steps from there on that an earlier
            attempt at the run wrote.

    Attributes:
        seconds: what writing has taken so far.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder = folder
        self.seconds = 0.0
        self._over = False
        self._records: Any = None
        self._do(lambda: self._open(first))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves, by tag."""
        pairs = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.add(Summary(value=pairs), step)

    def picture(self, tag: str, image: Image.Image, step: int) -> None:
        """A picture, as PNG."""
        png = io.BytesIO()
        image.save(png, "png")
        content = Summary.Image(
            width=image.width, height=image.height, encoded_image_string=png.getvalue()
        )
        self.add(Summary(value=[Summary.Value(tag=tag, image=content)]), step)

    def add(self, summary: Any, step: int = 0) -> None:
        """Anything else that `torch.utils.tensorboard.summary` makes."""
        event = Event(wall_time=time.time(), step=step, summary=summary)
        self._do(lambda: self._write(event))

    def close(self) -> None:
        """Close the file."""
        self._do(lambda: self._records.close())
        self._over = True

    def _open(self, first: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        who = f"{socket.gethostname()}.{os.getpid()}.{next(_number):04d}"  # readers go by name
        name = f"events.out.tfevents.{int(time.time()):010d}.{who}"
        self._records = RecordWriter(open(self.folder / name, "xb"))  # noqa: SIM115
        now = time.time()
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        again = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=now, step=first, session_log=again))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()  # so that a live run can be watched, and a failed one is complete

    def _do(self, write: Callable[[], None]) -> None:
        """Write unless an earlier attempt failed, and count the time."""
        if self._over:
            return
        started = time.perf_counter()
        try:
            write()
        except OSError as error:
            self._over = True
            line = f"TensorBoard's events can't be written to {self.folder}: {error.strerror}"
            tqdm.write(f"csipipe: warning: {line}; training continues without.", file=sys.stderr)
        self.seconds += time.perf_counter() - started
