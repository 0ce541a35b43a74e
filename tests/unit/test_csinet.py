"""CsiNet's files, MAT v5 and v7.3: how they are read, and what is said of damaged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from csifiles import csinet, images, save, save_v73
from numpy.typing import NDArray

from csipipe.channels import open_source
from csipipe.channels.csinet import frequency_channels
from csipipe.channels.layout import HT, Layout
from csipipe.channels.matfile import count_rows, read_rows
from csipipe.channels.transform import shrink


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "DATA_Htrainin.mat", images(9).reshape(9, -1))
    save(tmp_path / "DATA_Hvalin.mat", images(3, 1).reshape(3, -1), do_compression=True)
    save(tmp_path / "DATA_Htestin.mat", images(4, 2).astype(np.float64))
    return tmp_path


def read_all(path: Path, layout: Layout = HT) -> NDArray[Any]:
    return np.concatenate(list(read_rows(path, layout)))


def test_training_and_validation_files_are_joined_and_shuffled_by_seed(folder: Path) -> None:
    source = open_source(csinet(folder), 32, 32)
    rows = source.rows("indoor", "train", 0, 12)
    assert source.available("indoor", "train") == 12
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    joined = np.concatenate([images(9), images(3, 1)])
    order = [int(np.flatnonzero((joined == row).all(axis=(1, 2, 3)))[0]) for row in rows]
    assert sorted(order) == list(range(12))
    assert order != sorted(order)
    np.testing.assert_array_equal(source.rows("indoor", "train", 5, 8), rows[5:8])
    again = open_source(csinet(folder), 32, 32).rows("indoor", "train", 0, 12)
    np.testing.assert_array_equal(again, rows)
    other = open_source(csinet(folder, seed=1), 32, 32).rows("indoor", "train", 0, 12)
    assert not np.array_equal(other, rows)


def test_files_that_have_grown_since_they_were_counted_are_refused(folder: Path) -> None:
    source = open_source(csinet(folder), 32, 32)
    assert source.available("indoor", "train") == 12
    save(folder / "DATA_Hvalin.mat", images(4, 1).reshape(4, -1))
    with pytest.raises(ValueError, match="indoor train files had 12 rows and now have 13"):
        source.rows("indoor", "train", 0, 12)


def test_test_rows_come_in_file_order_and_four_axes_are_accepted(folder: Path) -> None:
    rows = open_source(csinet(folder), 32, 32).rows("indoor", "test", 1, 4)
    np.testing.assert_array_equal(rows, images(4, 2)[1:])


def test_a_file_is_converted_once_and_only_when_needed(folder: Path) -> None:
    source = open_source(csinet(folder), 32, 32)
    first = source.rows("indoor", "test", 0, 4)
    for path in folder.iterdir():
        path.unlink()
    np.testing.assert_array_equal(source.rows("indoor", "test", 0, 4), first)
    with pytest.raises(FileNotFoundError):
        source.rows("indoor", "train", 0, 1)


def test_smaller_models_get_shrunk_images(folder: Path) -> None:
    rows = open_source(csinet(folder), 16, 8).rows("indoor", "test", 0, 4)
    np.testing.assert_array_equal(rows, shrink(images(4, 2), 16, 8))


def test_missing_folders_files_rows_and_bins(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path is .*nowhere, which is not a folder"):
        open_source(csinet(folder / "nowhere"), 32, 32)
    with pytest.raises(ValueError, match=r"model\.angles is 64; CsiNet's files hold 32"):
        open_source(csinet(folder), 64, 32)
    source = open_source(csinet(folder), 32, 32)
    with pytest.raises(FileNotFoundError, match=r"DATA_Htrainout\.mat .*'DATA_Hvalin\.mat'"):
        source.available("outdoor", "train")
    with pytest.raises(ValueError, match=r"rows 2 to 5 were requested; .* <= 4"):
        source.rows("indoor", "test", 2, 5)


WITH_NAN = images(5).reshape(5, -1)
WITH_NAN[3, 7], WITH_NAN[4, 0] = np.nan, np.inf
WITH_EMPTY = images(4).reshape(4, -1)
WITH_EMPTY[1], WITH_EMPTY[3] = 0.5, 0.0


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        (images(2).reshape(2, -1), "H", r"no variable HT; found \['H'\].*rename"),
        (np.zeros((5, 2000)), "HT", r"shape \(5, 2000\); expected .*2048.*A row must hold"),
        (images(3).reshape(3, -1).T, "HT", r"shape \(2048, 3\).*transposed"),
        (np.zeros((2, 1, 32, 64)), "HT", r"shape \(2, 1, 32, 64\).*Reshape"),
        (np.zeros((0, 2048)), "HT", r"shape \(0, 2048\).*no rows"),
        (np.full((2, 2048), 0.5 + 0.1j), "HT", r"holds complex128 values; expected reals"),
        (np.ones((2, 2048), np.int16), "HT", r"class int16; expected real single or double"),
        (np.full((2, 2048), "a", object), "HT", r"class cell; expected real"),
        (WITH_NAN, "HT", r"NaN or infinite values, first in row 3"),
        (WITH_EMPTY, "HT", r"row 1 of HT .* holds a single value .* without energy"),
        (images(2).reshape(2, -1) - 0.5, "HT", r"lies in \[-0\.\d+, 0\.\d+\].*add 0\.5"),
        (
            np.linspace(0, 255, 4096).reshape(2, -1),
            "HT",
            r"lies in \[0, 255\] in rows 0 … 1; .*Scale each row",
        ),
    ],
)
def test_wrong_contents(tmp_path: Path, values: Any, key: str, message: str) -> None:
    path = save(tmp_path / "DATA_Htrainin.mat", values, key)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(csinet(tmp_path), 32, 32).rows("indoor", "train", 0, 1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, compressed: bool, share: float) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    save(path, images(4).reshape(4, -1), do_compression=compressed)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"DATA_Htestin\.mat can't be read: .*truncated"):
        read_all(path)


def test_files_that_are_not_mat_v5_or_v73(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    for content in (b"", b"<!DOCTYPE html><title>404</title>", b"\x80\x04pickle" + bytes(600)):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"not a MAT file of version 5 or 7.3: it starts with b'"
        ):
            read_all(path)
    save(path, np.full((2, 2048), 0.5), format="4")
    with pytest.raises(ValueError, match="not a MAT file"):
        read_all(path)


def test_big_endian_files_are_mat_v5_too(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI" + b"\x00\x00\x00\x0e")
    with pytest.raises(ValueError, match="can't be read"):
        read_all(path)


# MAT v7.3


def test_a_v73_file_holds_the_same_rows(tmp_path: Path) -> None:
    rows = images(9).reshape(9, -1)
    for options in ({}, {"chunks": (64, 4), "compression": "gzip"}, {"chunks": (2048, 9)}):
        path = save_v73(tmp_path / "DATA_Htestin.mat", rows, **options)
        assert count_rows(path) == 9
        np.testing.assert_array_equal(read_all(path), rows)
        source = open_source(csinet(tmp_path), 32, 32)
        np.testing.assert_array_equal(source.rows("indoor", "test", 2, 7), images(9)[2:7])


def test_v73_rows_are_found_on_either_axis(tmp_path: Path) -> None:
    rows = images(32)
    path = save_v73(tmp_path / "matlab.mat", rows)  # (32, 32, 2, 32) on disk
    np.testing.assert_array_equal(read_all(path), rows.reshape(32, -1))
    for count in (5, 2048):
        flat = np.tile(images(4).reshape(4, -1), (512, 1))[:count]
        with h5py.File(tmp_path / "python.h5", "w") as file:
            file["HT"] = flat  # rows first, and no word of MATLAB
        np.testing.assert_array_equal(read_all(tmp_path / "python.h5"), flat)
        turned = save_v73(tmp_path / "matlab.mat", flat)
        np.testing.assert_array_equal(read_all(turned), flat)


def test_v73_rows_are_read_a_piece_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csipipe.channels.matfile.PIECE", 3)
    rows = images(10).reshape(10, -1)
    path = save_v73(tmp_path / "a.mat", rows, chunks=(512, 2))
    assert [len(piece) for piece in read_rows(path)] == [4, 4, 2]  # whole chunks
    np.testing.assert_array_equal(read_all(path), rows)
    assert [len(piece) for piece in read_rows(save(path, rows))] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        (images(2).reshape(2, -1), "H", r"no variable HT; found \['H'\].*rename"),
        (np.zeros((5, 2000)), "HT", r"shape \(5, 2000\); expected .*2048.*A row must hold"),
        (np.full((2, 2048), 0.5 + 0.1j), "HT", r"holds complex128 values; expected reals"),
        (np.ones((2, 2048), np.int16), "HT", r"class int16; expected real single or double"),
        (np.ones((2, 2048), np.float16), "HT", r"class float16; expected real single"),
        (WITH_NAN, "HT", r"NaN or infinite values, first in row 3"),
    ],
)
def test_wrong_contents_of_v73(tmp_path: Path, values: Any, key: str, message: str) -> None:
    path = save_v73(tmp_path / "DATA_Htrainin.mat", values, key)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(csinet(tmp_path), 32, 32).rows("indoor", "train", 0, 1)
    assert str(path) in str(caught.value)


def test_v73_cells_groups_links_and_empty_matrices(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    with h5py.File(path, "w") as file:
        cell = file.create_dataset("HT", (2048, 2), h5py.ref_dtype)
        cell.attrs["MATLAB_class"] = np.bytes_("cell")
    with pytest.raises(ValueError, match=r"HT is of class cell; expected real"):
        count_rows(path)
    with h5py.File(path, "w") as file:
        file.create_group("HT")
    with pytest.raises(ValueError, match=r"HT is of class group"):
        count_rows(path)
    with h5py.File(path, "w") as file:
        file["HT"] = h5py.ExternalLink(save_v73(tmp_path / "b.mat", images(2)), "HT")
    with pytest.raises(ValueError, match=r"HT is of class .*link"):
        count_rows(path)
    with h5py.File(path, "w") as file:
        file["HT"] = np.array([0, 2048], np.uint64)
        file["HT"].attrs.update(MATLAB_class=np.bytes_("double"), MATLAB_empty=np.uint8(1))
    with pytest.raises(ValueError, match=r"shape \(0, 2048\).*no rows"):
        count_rows(path)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_truncated_v73_files(tmp_path: Path, share: float) -> None:
    path = save_v73(tmp_path / "DATA_Htestin.mat", images(40).reshape(40, -1), chunks=(2048, 8))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"DATA_Htestin\.mat can't be read: .*truncated"):
        read_all(path)


def test_a_v73_shape_without_bytes_behind_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "DATA.mat"
    with h5py.File(file, "w", userblock_size=512) as stored:
        shape = {"shape": (HT.width, 1_000_000), "chunks": (HT.width, 100)}
        made = stored.create_dataset("HT", dtype="f4", compression="gzip", **shape)
        made[:, :100] = 0.5  # the other rows would read as zeros
        made.attrs["MATLAB_class"] = np.bytes_("single")
    with file.open("rb+") as raw:
        raw.seek(124)
        raw.write(b"\x00\x02IM")
    with pytest.raises(ValueError, match=r"shape \(2048, 1000000\) needs more than the"):
        read_all(file)


def test_a_damaged_v73_chunk_is_named(tmp_path: Path) -> None:
    path = save_v73(
        tmp_path / "DATA_Htestin.mat",
        images(40).reshape(40, -1),
        chunks=(2048, 8),
        compression="gzip",
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"DATA_Htestin\.mat can't be read"):
        read_all(path)


# HF_all


def frequencies(count: int) -> NDArray[np.complex64]:
    made = np.random.default_rng(9).standard_normal((count, 32, 250), np.float32)
    return made.view(np.complex64)


@pytest.mark.parametrize("write", [save, save_v73])
def test_untruncated_channels_are_read(tmp_path: Path, write: Any) -> None:
    assert frequency_channels(tmp_path, "outdoor") is None
    made = frequencies(6)
    for values in (made, made.reshape(6, -1), made.astype(complex)):
        write(tmp_path / "DATA_HtestFout_all.mat", values, "HF_all")
        found = frequency_channels(tmp_path, "outdoor")
        assert found is not None
        assert found.dtype == np.complex64
        np.testing.assert_array_equal(found, made)


def test_untruncated_channels_are_those_of_the_test_rows(tmp_path: Path) -> None:
    save(tmp_path / "DATA_Htestin.mat", images(6).reshape(6, -1))
    for rows in (6, 5, 7):
        save(tmp_path / "DATA_HtestFin_all.mat", frequencies(rows), "HF_all")
        source = open_source(csinet(tmp_path))
        if rows == 6:
            found = source.frequency_rows("indoor", "test", 1, 4)
            np.testing.assert_array_equal(found, frequencies(6)[1:4])
            continue
        with pytest.raises(ValueError, match=f"HF_all has {rows} indoor rows, the test set 6"):
            source.frequency_rows("indoor", "test", 0, 5)


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        (frequencies(2), "HF", r"no variable HF_all; found \['HF'\]"),
        (frequencies(2).real, "HF_all", r"holds float32 values; expected complex"),
        (frequencies(2)[..., :124], "HF_all", r"shape \(2, 32, 124\).*32 angles x 125 freq"),
        (frequencies(2) * np.nan, "HF_all", r"NaN or infinite values, first in row 0"),
    ],
)
@pytest.mark.parametrize("write", [save, save_v73])
def test_wrong_untruncated_channels(
    tmp_path: Path, write: Any, values: Any, key: str, message: str
) -> None:
    path = write(tmp_path / "DATA_HtestFin_all.mat", values, key)
    with pytest.raises(ValueError, match=message) as caught:
        frequency_channels(tmp_path, "indoor")
    assert str(path) in str(caught.value)
