"""What a step finds: rows and texts, kept in a JSON file that is whole at any time."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from csipipe.files import write_file

KEPT = "kept"
"""Folder in a step's own with files that belong beside the page."""
_FOUND = "found.json"


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        wanted: what it should be, for people; empty: only measured.
        ok: whether it is so; None: only measured.
    """

    what: str
    found: str
    wanted: str = ""
    ok: bool | None = None


@dataclass
class Step:
    """One step under way.

    Attributes:
        device: where to measure; a CPU is a rehearsal at tiny sizes.
        folder: where it may write.
        seconds: how long it may take.
        rows: what was found, in order.
        texts: tables of plain text.
    """

    device: torch.device
    folder: Path
    seconds: float
    rows: list[Row] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def tiny(self) -> bool:
        """A rehearsal, whose figures mean nothing."""
        return self.device.type == "cpu"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.started + self.seconds - time.monotonic()

    def add(self, what: str, found: object, wanted: str = "", ok: bool | None = None) -> None:
        """Note one finding."""
        self.rows.append(Row(what, str(found), wanted, ok))
        print(f"{what}: {found} {'' if ok is None else 'ok' if ok else 'NOT OK'}", flush=True)
        self._write()

    def show(self, text: str) -> None:
        """Note a table of plain text."""
        self.texts.append(text)
        print(text, flush=True)
        self._write()

    def keep(self, file: Path) -> None:
        """Have a copy of `file` beside the page."""
        kept = self.folder / KEPT
        kept.mkdir(exist_ok=True)
        shutil.copy(file, kept)

    def _write(self) -> None:
        content = {"rows": [asdict(row) for row in self.rows], "texts": self.texts}
        write_file(self.folder / _FOUND, json.dumps(content))


def read(folder: Path) -> dict[str, Any]:
    """What the step with that folder found so far; nothing if it found nothing."""
    file = folder / _FOUND
    if not file.is_file():
        return {"rows": [], "texts": []}
    content: dict[str, Any] = json.loads(file.read_text())
    return content
