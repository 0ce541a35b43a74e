"""What a step finds: rows and texts, kept in a JSON file that is whole at any time."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

KEPT = "kept"
"""Folder in a step's own with files that belong beside the page."""


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
class Findings:
    """Rows of one step in the order in which they were found, and tables of plain text."""

    file: Path
    rows: list[Row] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

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

    def _write(self) -> None:
        content = {"rows": [asdict(row) for row in self.rows], "texts": self.texts}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        os.replace(partial, self.file)


@dataclass(frozen=True)
class Step:
    """What a step is given.

    Attributes:
        device: where to measure; a CPU is a rehearsal at tiny sizes.
        folder: where it may write.
        seconds: how long it may take.
    """

    device: torch.device
    folder: Path
    seconds: float
    findings: Findings
    started: float = field(default_factory=time.monotonic)

    @property
    def tiny(self) -> bool:
        """A rehearsal, whose figures mean nothing."""
        return self.device.type == "cpu"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.started + self.seconds - time.monotonic()

    def keep(self, file: Path) -> None:
        """Have a copy of `file` beside the page."""
        kept = self.folder / KEPT
        kept.mkdir(exist_ok=True)
        shutil.copy(file, kept)

    def add(self, what: str, found: object, wanted: str = "", ok: bool | None = None) -> None:
        """As `Findings.add`."""
        self.findings.add(what, found, wanted, ok)


def read(file: Path) -> dict[str, Any]:
    """What a step's file holds; nothing if it found nothing."""
    if not file.is_file():
        return {"rows": [], "texts": []}
    content: dict[str, Any] = json.loads(file.read_text())
    return content
