"""MAT v5 as other programs write it: byte orders, short numbers, and sizes that lie."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from csifiles import images, save
from numpy.typing import NDArray
from scipy import io

from csipipe.channels import rawarray
from csipipe.channels.layout import HT, Layout
from csipipe.channels.matfile import count_rows, read_rows

ROWS = images(5).reshape(5, -1)


def element(order: str, kind: int, data: bytes) -> bytes:
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


def written(
    path: Path,
    values: NDArray[Any],
    order: str = "<",
    numbers: str = "f4",
    kind: int = 7,
    shape: tuple[int, ...] | None = None,
    deflated: bool = False,
    damage: Callable[[bytes], bytes] = lambda data: data,
) -> Path:
    """HT by the book: of class single, its numbers of type `kind`; `damage` is done to its data."""
    matrix = element(order, 6, struct.pack(f"{order}II", 7, 0))
    matrix += element(order, 5, struct.pack(f"{order}2i", *(shape or values.shape)))
    matrix += element(order, 1, b"HT")
    matrix += element(order, kind, values.astype(order + numbers).tobytes("F"))
    if deflated:
        data = damage(zlib.compress(element(order, 14, matrix)))
        content = struct.pack(f"{order}II", 15, len(data)) + data
    else:
        content = element(order, 14, damage(matrix))
    mark = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + mark + content)
    return path


def read_all(path: Path, layout: Layout = HT) -> NDArray[Any]:
    return np.concatenate(list(read_rows(path, layout)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflated", [False, True])
def test_both_byte_orders(order: str, deflated: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "a.mat", ROWS, order, deflated=deflated)
    np.testing.assert_array_equal(io.loadmat(path)["HT"], ROWS)  # the file is right
    np.testing.assert_array_equal(read_all(path), ROWS)


def test_whole_numbers_are_kept_in_fewer_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mat", ROWS.round(), numbers="u1", kind=2)
    np.testing.assert_array_equal(read_all(path), ROWS.round())


@pytest.mark.parametrize("deflated", [False, True])
def test_it_is_found_among_others(deflated: bool, tmp_path: Path) -> None:
    others = {"a": 1.0, "text": "x" * 99, "cell": np.array([[1], "b"], object), "s": {"x": 1}}
    path = tmp_path / "a.mat"
    io.savemat(path, {**others, "HT": ROWS, "z": np.eye(3)}, do_compression=deflated)
    np.testing.assert_array_equal(read_all(path), ROWS)


def test_it_is_found_behind_a_string_of_matlabs(tmp_path: Path) -> None:
    kind = element("<", 6, struct.pack("<II", 17, 0))  # neither dimensions nor a name of its own
    string = kind + b"".join(element("<", 1, word) for word in (b"s", b"MCOS", b"string"))
    path = written(tmp_path / "a.mat", ROWS)
    data = path.read_bytes()
    path.write_bytes(data[:128] + element("<", 14, string) + data[128:])
    np.testing.assert_array_equal(read_all(path), ROWS)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("unit", [1, 1 + 2j])
def test_arrays_of_an_odd_number_of_values(unit: complex, deflated: bool, tmp_path: Path) -> None:
    values = (unit * np.arange(15)).reshape(3, 5)
    values = values.astype(np.complex64 if unit.imag else np.float32)
    io.savemat(tmp_path / "a.mat", {"H": values}, do_compression=deflated)
    with rawarray.opened(tmp_path / "a.mat") as array:
        np.testing.assert_array_equal(array.cut(1, 2, 5), values[:, 2:])


@pytest.mark.parametrize("deflated", [False, True])
def test_a_shape_that_the_bytes_dont_have(deflated: bool, tmp_path: Path) -> None:
    for rows in (4, 6, 2**31 - 1):
        path = written(tmp_path / "a.mat", ROWS, shape=(rows, 2048), deflated=deflated)
        assert count_rows(path) == rows
        with pytest.raises(ValueError, match=r"a\.mat can't be read: .* comes with 40,960 bytes"):
            read_all(path)


def test_a_wrong_checksum(tmp_path: Path) -> None:
    def wrong(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    path = written(tmp_path / "a.mat", ROWS, deflated=True, damage=wrong)
    with pytest.raises(ValueError, match=r"a\.mat can't be read: .*inflated .*incorrect data"):
        read_all(path)


def test_a_missing_checksum(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mat", ROWS, deflated=True, damage=lambda data: data[:-4])
    with pytest.raises(ValueError, match=r"a\.mat can't be read: .*deflated data has no end"):
        read_all(path)


def test_numbers_that_go_on_into_the_next_variable(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mat", ROWS, damage=lambda data: data[:-800])
    other = written(tmp_path / "b.mat", ROWS).read_bytes()[128:].replace(b"HT", b"ZZ")
    with path.open("ab") as file:
        file.write(other)
    with pytest.raises(ValueError, match="40,960 bytes are announced where only 40,160 are left"):
        read_all(path)


def test_a_type_that_there_isnt_is_refused_where_scipy_dies(tmp_path: Path) -> None:
    # why the reader is our own; once this fails, SciPy's can take its place
    path = written(tmp_path / "a.mat", ROWS, kind=255)
    with pytest.raises(ValueError, match=r"a\.mat can't be read: .*element of type 255 where"):
        read_all(path)
    scipy = [sys.executable, "-c", f"from scipy import io; io.loadmat({str(path)!r})"]
    died = subprocess.run(scipy, capture_output=True, timeout=60)
    assert died.returncode == -signal.SIGSEGV, died.stderr


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mat", ROWS, do_compression=True)
    with pytest.raises(OSError, match=r"No such file .*unpacking .*a\.mat in .*nowhere"):
        list(read_rows(path, scratch=tmp_path / "nowhere"))
