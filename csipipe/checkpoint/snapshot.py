"""A run's whole state on disk, `checkpoints/<iteration>/`: complete, or not there.

Every rank writes its parts into `<iteration>.partial`; when all have, rank 0 adds the manifest and
renames the folder. A part (`ue-3.safetensors`, `tail-0.safetensors`) belongs to a UE or to a layer
of the tail, whoever hosted it. Parts are flushed to disk before the folder gets its name, so that a
snapshot survives the death of a node; if it doesn't, its hashes tell.

The ranks of all nodes see one file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from csipipe.checkpoint import weights
from csipipe.files import DAMAGED, flush

FORMAT = 2
"""Of the manifest and the parts; any other is refused. 1 had no `dropped` and other digests."""
MANIFEST = "manifest.json"
_REMEDY = "delete {} to resume from the checkpoint before it, or name another in run.resume"


@dataclass(frozen=True)
class Record:
    """A part as the manifest lists it: bytes of its file, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


def write_part(partial: Path, name: str, tensors: dict[str, Tensor]) -> Record:
    """Write a part, contiguous tensors on the host, into the folder of an unfinished snapshot.

    Raises:
        OSError: it can't be written.
    """
    file = _file(partial, name)
    weights.write(file, tensors)
    flush(file)
    with file.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256")
        return Record(written.tell(), digest.hexdigest())


def commit(partial: Path, content: dict[str, Any], parts: dict[str, Record]) -> Path:
    """Write the manifest and give the snapshot its name; returns its folder (OSError)."""
    final = partial.with_suffix("")
    body = {
        "format": FORMAT,
        **content,
        "parts": {name: asdict(record) for name, record in parts.items()},
    }
    body["sha256"] = _digest(_canonical(body))
    (partial / MANIFEST).write_text(json.dumps(body, indent=1) + "\n")
    flush(partial / MANIFEST)
    _flush_folder(partial)
    if final.exists():  # an earlier attempt's, later than the one that was resumed from
        discard(final)
    os.rename(partial, final)
    _flush_folder(final.parent)
    return final


def discard(folder: Path) -> None:
    """Remove a snapshot, complete or not; without its manifest it no longer counts as one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(checkpoints: Path) -> None:
    """Remove what dying processes left unfinished."""
    for folder in checkpoints.glob("*.partial"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in _numbered(checkpoints):
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` snapshots."""
    for folder in _whole(checkpoints)[:-keep]:
        discard(folder)


def rewind(checkpoints: Path, iteration: int) -> list[int]:
    """Remove snapshots and best weights later than `iteration`; returns which snapshots.

    Otherwise `prune` would remove the new ones of a run that resumes from `iteration`.
    """
    later = [path for path in _whole(checkpoints) if int(path.name) > iteration]
    for folder in later:
        discard(folder)
    best = checkpoints / "best"
    taken = weights.switched(best)
    if taken is not None and taken > iteration:
        shutil.rmtree(best.resolve(), ignore_errors=True)
        best.unlink()
    return [int(path.name) for path in later]


def newest(checkpoints: Path) -> Path | None:
    """Folder of the newest complete snapshot."""
    found = _whole(checkpoints)
    return found[-1] if found else None


def find(path: Path) -> Path:
    """The snapshot that the user named: its folder, or a run's directory for its newest one.

    Returns:
        Its folder, as an absolute path: two levels up is the run's directory.

    Raises:
        ValueError: there is none.
    """
    path = Path(os.path.abspath(path))
    run = (path / "config.yaml").is_file()  # whose manifest.json lists rows
    if not run and (path / MANIFEST).is_file() and path.name.isdigit():
        return path
    found = newest(path / "checkpoints")
    if found is None:
        raise ValueError(
            f"run.resume: {path} is neither a checkpoint nor the directory of a run with one; "
            "give RUN or RUN/checkpoints/ITERATION."
        )
    return found


class Snapshot:
    """A snapshot to read from.

    Attributes:
        content: what `commit` was given: `iteration`, `settings` and the rest.

    Raises:
        ValueError: a manifest that is missing, damaged or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / MANIFEST
        try:
            content = json.loads(file.read_text())
            version = content["format"]
            digest = content.pop("sha256")
        except (OSError, *DAMAGED) as error:
            raise ValueError(f"{file} can't be read ({error!r}); {self._remedy}.") from error
        if version != FORMAT:
            raise ValueError(
                f"{file} has format {version!r}, this csipipe reads {FORMAT}; resume with the "
                "version that wrote it."
            )
        if digest != _digest(_canonical(content)):
            raise ValueError(f"{file} was altered since it was written; {self._remedy}.")
        self.content: dict[str, Any] = content

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A part's tensors, once size and digest have been checked.

        Raises:
            ValueError: a file that is missing, cut short or altered; it is named.
        """
        file = _file(self.folder, name)
        record = self.content["parts"].get(name)
        if record is None:
            raise ValueError(
                f"{self.folder} has no part {name}; it belongs to another model or split."
            )
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file} is missing ({error.strerror}); {self._remedy}.") from error
        if len(data) != record["size"]:
            raise ValueError(
                f"{file} has {len(data)} bytes instead of {record['size']}; {self._remedy}."
            )
        if _digest(data) != record["sha256"]:
            raise ValueError(f"{file} was altered since it was written; {self._remedy}.")
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            raise ValueError(f"{file} can't be read ({error}); {self._remedy}.") from error

    @property
    def _remedy(self) -> str:
        return _REMEDY.format(self.folder)


def _numbered(checkpoints: Path) -> list[Path]:
    """Folders with the name of a snapshot, the newest last."""
    found = [path for path in checkpoints.glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _whole(checkpoints: Path) -> list[Path]:
    return [path for path in _numbered(checkpoints) if (path / MANIFEST).is_file()]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _flush_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk; some file systems can't."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
