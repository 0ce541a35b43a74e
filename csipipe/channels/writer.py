"""Writes a folder of csipipe's own format, piece by piece, completely or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from csipipe import files
from csipipe.channels.format import Description, Set, SetPart, Stored
from csipipe.channels.source import Images

_NUMBERED = "environment-"


class Writer:
    """Collects rows beside `folder`, and renames the whole when it is described.

    ::

        with Writer(Path("data")) as out:
            out.add("all", "train", images, scale)  # as often as needed
            out.finish(lambda sets: Description(angles=32, delays=32, sets=sets))

    Args:
        folder: must not exist, or be empty.

    Raises:
        FileExistsError: something is there.
        BlockingIOError: another process is writing it.
        OSError: it can't be written, or the disk is full; nothing is left.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._open: dict[tuple[str, SetPart], dict[str, _Growing]] = {}
        self._numbers: dict[str, int] = {}  # of environments, in the order in which they came
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        folder, partial = self._folder, self._partial
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} exists; nothing is overwritten. Remove it, or name another folder."
            )
        partial.mkdir(parents=True, exist_ok=True)
        lock = self._stack.enter_context((partial / "lock").open("a"))
        if not files.lock(lock.fileno()):
            self._stack.close()
            raise BlockingIOError(f"{folder} is being written by another process; wait for it.")
        for left in partial.iterdir():  # by a process that was killed
            if left.name != "lock":
                left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for grown in self._open.values():
            for one in grown.values():
                one.close()
        if self._partial.is_dir():
            shutil.rmtree(self._partial, ignore_errors=True)
        self._stack.close()

    def add(
        self,
        environment: str,
        part: SetPart,
        images: Images,
        scale: NDArray[np.float32] | None = None,
        frequency: NDArray[np.complex64] | None = None,
        user: NDArray[np.int64] | None = None,
    ) -> None:
        """Append rows to a set: the same files as at the first time.

        Args:
            images: (B, 2, A, D) in [0, 1], one at least.
            scale: (B,), see `format.Set`.
            frequency: (B, A, K).
            user: (B,), see `format.Set`.

        Raises:
            OSError: the disk is full.
        """
        given = {"images": images, "scale": scale, "frequency": frequency, "user": user}
        values = {name: rows for name, rows in given.items() if rows is not None}
        key = environment, part
        if key not in self._open:
            number = self._numbers.setdefault(environment, len(self._numbers))
            self._open[key] = {
                name: _Growing(self._partial / file_name(environment, number, part, name), rows)
                for name, rows in values.items()
            }
        assert set(self._open[key]) == set(values), (set(self._open[key]), set(values))
        try:
            for name, rows in values.items():
                self._open[key][name].append(rows)
        except OSError as error:
            free = shutil.disk_usage(self._partial).free
            raise OSError(
                f"{self._folder} can't be written: {error.strerror}; {free:,} bytes are free. "
                "Make room, or name a folder on another disk. Nothing was left."
            ) from error

    def finish(self, describe: Callable[[tuple[Set, ...]], Description]) -> Description:
        """Complete the files, describe them and give the folder its name.

        Args:
            describe: from the sets to their `Description`.
        """
        sets = []
        order = get_args(SetPart)
        for environment, part in sorted(
            self._open, key=lambda key: (self._numbers[key[0]], order.index(key[1]))
        ):
            grown = self._open[environment, part]
            rows = grown["images"].rows
            sets.append(Set(environment, part, rows, **{k: v.end() for k, v in grown.items()}))
        description = describe(tuple(sets))
        description.write(self._partial)
        (self._partial / "lock").unlink()
        os.rename(self._partial, self._folder)
        return description


def file_name(environment: str, number: int, part: str, kind: str) -> str:
    """Name of a set's file: the environment's, or its number where that isn't short or isn't of
    A-Z, 0-9, _ and - alone, or looks like a number."""
    plain = environment.isascii() and environment.replace("-", "").replace("_", "").isalnum()
    plain = plain and len(environment) < 100 and not environment.startswith(_NUMBERED)
    name = environment if plain else f"{_NUMBERED}{number}"
    return f"{name}-{part}{'' if kind == 'images' else f'-{kind}'}.npy"


class _Growing:
    """An .npy file of rows, of which there will be as many as are appended."""

    def __init__(self, path: Path, rows: NDArray[Any]) -> None:
        self._path = path
        self._dtype = rows.dtype.newbyteorder("<")
        self._row = rows.shape[1:]
        self.rows = 0
        self._file = path.open("xb", buffering=0)  # see `write_all`
        files.write_all(self._file, self._header())

    def append(self, rows: NDArray[Any]) -> None:
        assert rows.shape[1:] == self._row, (rows.shape, self._row)
        files.write_all(self._file, np.ascontiguousarray(rows, self._dtype).data.cast("B"))
        self.rows += len(rows)

    def end(self) -> Stored:
        """Write the number of rows, and flush to disk."""
        self._file.seek(0)
        files.write_all(self._file, self._header())
        os.fsync(self._file.fileno())
        self.close()
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Stored(self._path.name, self._path.stat().st_size, sha256)

    def close(self) -> None:
        self._file.close()

    def _header(self) -> bytes:
        """As long for any number of rows, since NumPy leaves room for it to grow."""
        text = io.BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.rows, *self._row),
        }
        np.lib.format.write_array_header_1_0(text, described)
        return text.getvalue()
