"""A folder that is written under another name, then renamed; never half written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from csipipe.files import naming

MANIFEST = "export.json"
_ROOM = 1 << 20
"""Bytes; with less, a disk is full."""


@contextlib.contextmanager
def whole(out: Path, mark: str) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `out` if nothing fails.

    Until then `out` is as it was.

    Args:
        mark: the file that such a folder has; without it, what is there isn't replaced.

    Raises:
        ValueError: `out` exists and has no such file.
        OSError: it can't be written.
    """
    if out.exists() and not (out / mark).is_file():
        raise ValueError(f"{out} exists and holds no {mark}; choose another folder.")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"{out} can't be written: {error.strerror}; choose another folder."
        ) from error
    try:
        with naming(out):
            try:
                yield partial
            except RuntimeError:  # of PyTorch's and ONNX's writers, who don't say why
                (partial / "room").write_bytes(bytes(_ROOM))
                raise
        old = out.with_name(f"{out.name}.{os.getpid()}.old.partial")
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
