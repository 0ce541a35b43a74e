"""Arrays in files of other programs, opened without unpickling and read piece by piece.

.npy, .npz, .mat (v5, v7.3), .h5 / .hdf5, .csv / .txt and .pt (by `torch.load(weights_only=True)`).
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from csipipe.channels import hdf5, mat5
from csipipe.channels.layout import Unfit

Cut = Callable[[int, int, int], NDArray[Any]]


@dataclass(frozen=True)
class RawArray:
    """An open array of real or complex numbers."""

    path: Path
    key: str
    """Name of the variable; empty where the file has only one."""
    shape: tuple[int, ...]
    dtype: str
    cut: Cut
    """`cut(axis, start, stop)`: that part of the array, in memory."""
    in_order: bool = False
    """Whether it can only be read forward along axis 0 (text)."""
    note: str = ""
    """What else there is to know: MATLAB's order of axes, for example."""

    def __str__(self) -> str:
        name = f"{self.path}: {self.key}" if self.key else f"{self.path}"
        return f"{name} {self.dtype} {self.shape}"


@contextmanager
def opened(path: Path, key: str | None = None, scratch: Path | None = None) -> Iterator[RawArray]:
    """The array of a file.

    Args:
        key: the variable; None: the only array that there is.
        scratch: folder for what must be unpacked; None: the system's.

    Raises:
        FileNotFoundError: no such file.
        SeveralError: several arrays, and no key.
        ValueError: no such variable, not numbers, pickled objects, a damaged file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist, or isn't a file.")
    with ExitStack() as stack:
        try:
            array = _open(stack, path, key, scratch)
        except (FileNotFoundError, Unfit, mat5.NoRoomError):
            raise
        except Exception as error:  # each library has its own, for whatever the damage leads to
            raise _damaged(path, error) from error
        if 0 in array.shape or not array.shape:
            raise ValueError(f"{array} holds no values; expected an array with samples.")

        def cut(axis: int, start: int, stop: int) -> NDArray[Any]:
            try:
                return array.cut(axis, start, stop)
            except Exception as error:
                if str(path) in str(error):
                    raise
                raise _damaged(path, error) from error

        yield replace(array, cut=cut)


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} ({path.stat().st_size:,} bytes) can't be read: {type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else ''}. It is truncated, damaged or "
        "not what its name says; copy or save it again."
    )


class SeveralError(Unfit):
    """A file holds several arrays, and none was named.

    Attributes:
        names: theirs.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        found = ", ".join(map(repr, names[:20]))
        super().__init__(f"{path} holds {len(names)} arrays; found {found}. Name one with --key.")
        self.names = names


def _open(stack: ExitStack, path: Path, key: str | None, scratch: Path | None) -> RawArray:
    kind = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(128)
    if head.startswith(b"\x93NUMPY"):
        return _npy(path, path, "")
    if hdf5.is_hdf5(head):
        return _hdf5(stack, path, key)
    if head[124:] in mat5.MARKS:
        return _mat5(stack, path, key, scratch)
    if kind == ".npz":
        return _npz(stack, path, key, scratch)
    if kind in (".pt", ".pth"):
        return _torch(path, key)
    if kind in (".csv", ".txt"):
        return _text(stack, path)
    if kind == ".mat" and head[:4] in mat5.VERSION_4:
        raise Unfit(
            f"{path} is a MAT file of version 4; expected 5 or 7.3. In Octave: save -v7 FILE NAME; "
            "in MATLAB: save(FILE, 'NAME', '-v7.3')."
        )
    what = f"of an unknown kind: it starts with {head[:12]!r}"
    if head[:1] == b"\x80" or kind in (".pkl", ".pickle"):
        what = "a pickle, which can execute anything when it is read; it is never loaded"
    raise Unfit(
        f"{path} is {what}. Expected .npy, .npz, .mat, .h5, .csv or .pt; in Python: "
        "numpy.save('channels.npy', array)."
    )


def _npy(path: Path, file: Path, key: str) -> RawArray:
    with file.open("rb") as opened:
        version = np.lib.format.read_magic(opened)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        _shape, _, dtype = read(opened)
    _check_numbers(path, key, dtype)
    values = np.load(file, mmap_mode="r", allow_pickle=False)
    return _of(path, key, values)


def _of(path: Path, key: str, values: NDArray[Any], note: str = "") -> RawArray:
    _check_numbers(path, key, values.dtype)

    def cut(axis: int, start: int, stop: int) -> NDArray[Any]:
        found = np.array(values[(slice(None),) * axis + (slice(start, stop),)])
        _release(values)
        return found

    return RawArray(path, key, values.shape, values.dtype.name, cut, note=note)


def _release(values: NDArray[Any]) -> None:
    """Give back the pages of a mapped file: those that were touched would count as ours."""
    memory: Any = values
    while isinstance(memory, np.ndarray | memoryview):
        memory = memory.base if isinstance(memory, np.ndarray) else memory.obj
    if isinstance(memory, mmap.mmap):
        memory.madvise(mmap.MADV_DONTNEED)


def _npz(stack: ExitStack, path: Path, key: str | None, scratch: Path | None) -> RawArray:
    archive = stack.enter_context(zipfile.ZipFile(path))
    names = {name.removesuffix(".npy"): name for name in archive.namelist()}
    name = _choose(path, key, names)
    held = tempfile.NamedTemporaryFile(dir=scratch, suffix=".npy")  # noqa: SIM115 - the stack's
    stack.enter_context(held)
    with archive.open(names[name]) as packed:
        shutil.copyfileobj(packed, held, 1 << 20)
    held.flush()
    return _npy(path, Path(held.name), name)


def _torch(path: Path, key: str | None) -> RawArray:
    import torch

    try:
        mapped = zipfile.is_zipfile(path)  # as torch has written files since 1.6
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise Unfit(
                f"{path} holds more than tensors, which only unpickling could read; it is never "
                "done here. Save the tensor alone: torch.save(tensor, 'channels.pt')."
            ) from error
        raise
    tensors = content if isinstance(content, Mapping) else {"": content}
    tensors = {str(k): v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    name = _choose(path, key, tensors)
    values = tensors[name].detach()
    if values.dtype == torch.bfloat16:
        values = values.float()
    return _of(path, name, values.resolve_conj().numpy())


def _mat5(stack: ExitStack, path: Path, key: str | None, scratch: Path | None) -> RawArray:
    found = {variable.name: variable for variable in mat5.variables(path)}
    name = _choose(path, key, found)
    rows = stack.enter_context(mat5.opened(path, found[name], scratch))
    parts = rows.mapped()
    if len(parts) == 1:
        return _of(path, name, parts[0])
    real, imag = parts

    def cut(axis: int, start: int, stop: int) -> NDArray[Any]:
        part = (slice(None),) * axis + (slice(start, stop),)
        found: NDArray[Any] = real[part] + 1j * imag[part]
        _release(real)
        return found

    return RawArray(path, name, real.shape, "complex", cut)


def _hdf5(stack: ExitStack, path: Path, key: str | None) -> RawArray:
    h5py = hdf5.library(path)
    file = stack.enter_context(h5py.File(path, "r", locking=False))
    places = {_variable(place): place for place in hdf5.own_arrays(h5py, file)}
    name = _choose(path, key, places)
    stored = file[places[name]]
    if stored.dtype.hasobject or h5py.check_ref_dtype(stored.dtype):
        raise Unfit(
            f"{path}: {name} is a cell array or a struct of references; expected a plain array of "
            "numbers. Save the array itself."
        )
    dtype = stored.dtype
    paired = dtype.names if dtype.names in (("real", "imag"), ("r", "i")) else None
    _check_numbers(path, name, dtype[paired[0]] if paired else dtype)
    hdf5.check_storage(stored)
    turned = "MATLAB_class" in stored.attrs or places[name] != name
    axes = len(stored.shape)

    def cut(axis: int, start: int, stop: int) -> NDArray[Any]:
        where = axes - 1 - axis if turned else axis
        block = stored[(slice(None),) * where + (slice(start, stop),)]
        if paired:
            block = block[paired[0]] + 1j * block[paired[1]]
        return np.asarray(block.T if turned else block)

    note = "its axes are in MATLAB's order, which HDF5 reverses" if turned else ""
    shape = tuple(stored.shape[::-1] if turned else stored.shape)
    return RawArray(path, name, shape, "complex" if paired else dtype.name, cut, note=note)


def _variable(place: str) -> str:
    """The name of a dataset; Octave's variables are groups, with the array as `value`."""
    group, _, last = place.partition("/")
    return group if last == "value" else place


def _text(stack: ExitStack, path: Path) -> RawArray:
    with path.open("rb") as file:
        first = file.readline().decode("ascii", "replace")
        file.seek(0)
        lines = sum(1 for line in file if line.strip())
    mark = "," if "," in first else ";" if ";" in first else None
    names = [cell.strip() for cell in first.split(mark) if not _is_number(cell)]
    if names:
        raise Unfit(
            f"{path} starts with {first.strip()[:60]!r}, where {names[0][:20]!r} is no number; "
            "expected numbers only. If that is a header, remove it: "
            f"tail -n +2 {path.name} > plain.csv"
        )
    width = len(first.split(mark))
    is_complex = "j" in first
    stream: list[Any] = [None, 0]

    def cut(axis: int, start: int, stop: int) -> NDArray[Any]:
        assert axis == 0
        if start != stream[1] or stream[0] is None:
            assert start == 0
            stream[0] = stack.enter_context(path.open(encoding="ascii"))
        stream[1] = stop
        try:
            values = np.loadtxt(
                _some(stream[0], stop - start),
                np.complex64 if is_complex else np.float32,
                delimiter=mark,
                comments=None,  # a line that is one was counted as numbers
                ndmin=2,
            )
        except (ValueError, UnicodeDecodeError) as error:
            reason = str(error).partition(";")[0].rstrip(".")  # then NumPy's advice to us
            raise ValueError(
                f"{path}, lines {start + 1} to {stop}: {reason}; expected {width} numbers in each."
            ) from error
        if values.shape != (stop - start, width):
            raise ValueError(
                f"{path}, lines {start + 1} to {stop}, hold {values.shape[1]} numbers each; "
                f"expected {width}, as in the first."
            )
        return values

    kind = "complex64" if is_complex else "float32"
    return RawArray(path, "", (lines, width), kind, cut, in_order=True)


def _some(file: IO[str], count: int) -> Iterator[str]:
    while count:
        line = file.readline()
        if not line:
            return
        if line.strip():
            count -= 1
            yield line


def _is_number(cell: str) -> bool:
    try:
        complex(cell.strip())
    except ValueError:
        return False
    return True


def _choose(path: Path, key: str | None, found: Mapping[str, Any]) -> str:
    if key is not None and key in found:
        return key
    if key is None and len(found) == 1:
        return next(iter(found))
    if key is None and found:
        raise SeveralError(path, sorted(found))
    names = ", ".join(sorted(map(repr, found))[:20]) or "none"
    asked = f"has no array {key!r}" if key is not None else "holds no array"
    raise Unfit(f"{path} {asked}; found {names}.{' Name one with --key.' * bool(found)}")


def _check_numbers(path: Path, key: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind in "fciu":
        return
    name = f"{path}: {key}" if key else str(path)
    if dtype.hasobject:
        raise Unfit(
            f"{name} is an array of Python objects, a pickle; it is never loaded. Save a plain "
            "array: numpy.save('channels.npy', numpy.stack(list_of_equal_arrays))."
        )
    raise Unfit(
        f"{name} holds {dtype}; expected real or complex numbers. Save a plain array of them."
    )
