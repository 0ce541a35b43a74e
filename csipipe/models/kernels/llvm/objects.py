"""Compiled kernels on disk: what one process has compiled, the next one loads.

They are machine code, so the folder is as trusted as a program of the user's own: nothing is
loaded unless folder and file belong to the user and nobody else can write to them. A file names
what it was made of and carries a digest, so that a damaged one is compiled again. Without a usable
folder, or with CSIPIPE_CACHE_KERNELS=0, every process compiles for itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csipipe import files


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, and the names of its arrays in order."""

    arrays: list[str]
    code: bytes


@functools.cache
def _sources() -> str:
    """Digest of the code that describes and compiles kernels."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load(of: str) -> Compiled | None:
    """The kernel that was made of `of`, if it is there and sound."""
    try:
        header, _, code = _read(_folder() / _name(of)).partition(b"\n")
        about = json.loads(header)
        arrays = [str(name) for name in about["arrays"]]
        if about["digest"] == _digest(of, arrays, code):
            return Compiled(arrays, code)
    except (OSError, RuntimeError, *files.DAMAGED):
        pass  # none yet, none allowed, or damaged
    return None


def store(of: str, kernel: Compiled) -> None:
    """Keep a kernel for the next process, if that is possible."""
    about = {"arrays": kernel.arrays, "digest": _digest(of, kernel.arrays, kernel.code)}
    with contextlib.suppress(OSError, RuntimeError):
        file = _folder() / _name(of)
        partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}")  # other ranks write too
        with files.whole(file, partial):
            made = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(made, "wb") as out:
                out.write(json.dumps(about).encode() + b"\n" + kernel.code)


def _folder() -> Path:
    """Where kernels are kept; raises OSError where none may be."""
    if os.environ.get("CSIPIPE_CACHE_KERNELS") == "0":
        raise PermissionError("CSIPIPE_CACHE_KERNELS is 0")
    folder = files.cache_folder() / f"kernels-{os.geteuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check(folder.lstat(), stat.S_ISDIR)
    return folder


def _read(path: Path) -> bytes:
    """A file that only this user can have written."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        _check(os.fstat(file.fileno()), stat.S_ISREG)
        return file.read()


def _check(found: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Refuse (OSError) what somebody else owns or can write to."""
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid != os.geteuid() or others or not is_kind(found.st_mode):
        raise PermissionError("it isn't this user's alone")


def _name(of: str) -> str:
    return hashlib.sha256(f"{_sources()} {of}".encode()).hexdigest()[:32]


def _digest(of: str, arrays: list[str], code: bytes) -> str:
    about = json.dumps([_sources(), of, arrays]).encode()
    return hashlib.sha256(about + b"\n" + code).hexdigest()
