"""The converted copy of a file: made once, made again when it must be, never left half written."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from csifiles import images, save, save_v73

from csipipe.channels import cache, layout, matfile
from csipipe.channels.cache import converted
from csipipe.channels.doctor import Finding, examine
from csipipe.channels.synthetic import SyntheticSource
from csipipe.files import cache_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CSIPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "DATA_Htestin.mat", images(20).reshape(20, -1))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Sources in the order in which their rows were read for the cache."""
    seen: list[Path] = []
    read = matfile.read_rows

    def spy(source: Path, **options: Any) -> Iterator[Any]:
        seen.append(source)
        return read(source, **options)

    monkeypatch.setattr(cache, "read_rows", spy)
    return seen


def names(folder: Path) -> list[str]:
    """Endings of what lies in the cache."""
    return sorted(path.suffix or path.name for path in folder.iterdir())


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder().name == "cache"
    monkeypatch.delenv("CSIPIPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/csipipe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "csipipe"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    for name in ("HOME", "CSIPIPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(FileNotFoundError, match=r"HOME isn't set.*set CSIPIPE_CACHE to a"):
        cache_folder()


def test_a_copy_is_an_npy_file_of_the_sources_rows(source: Path, folder: Path) -> None:
    copy = converted(source)
    assert copy.rows == 20
    np.testing.assert_array_equal(copy.open(), images(20).reshape(20, -1))
    copy.open()[:] = 0.0  # pages of its own
    np.testing.assert_array_equal(copy.open(), images(20).reshape(20, -1))
    mapped = np.load(copy.file(), mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(mapped, copy.open())
    assert names(folder) == [".findings", ".json", ".npy", "lock"]


def test_doubles_and_v73_become_the_same_floats(tmp_path: Path) -> None:
    rows = images(5).reshape(5, -1)
    for write in (save, save_v73):
        copy = converted(write(tmp_path / "a.mat", rows.astype(np.float64)))
        assert copy.open().dtype == np.float32
        np.testing.assert_array_equal(copy.open(), rows)


def test_an_unchanged_file_is_neither_read_nor_hashed_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = converted(source)

    def fail(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(cache, "count_rows", fail)
    monkeypatch.setattr(hashlib, "file_digest", fail)
    assert converted(source) == copy
    monkeypatch.chdir(source.parent)
    assert converted(Path(source.name)) == copy


def test_the_same_content_is_not_converted_again(source: Path, written: list[Path]) -> None:
    copy = converted(source)
    os.utime(source, ns=(0, 0))
    assert converted(source).sha256 == copy.sha256
    moved = source.rename(source.with_name("DATA_Hvalin.mat"))
    assert converted(moved).file() == copy.file()
    assert written == [source]


def test_another_content_is_converted(source: Path, written: list[Path]) -> None:
    before = converted(source)
    save(source, images(20, 1).reshape(20, -1))
    os.utime(source, ns=(0, before.mtime_ns + 1))
    after = converted(source)
    np.testing.assert_array_equal(after.open(), images(20, 1).reshape(20, -1))
    np.testing.assert_array_equal(before.open(), images(20).reshape(20, -1))
    assert written == [source, source]


@pytest.mark.parametrize("size", [0, 100, 128 + 20 * 8192 - 1, 128 + 20 * 8192 + 1])
def test_a_copy_of_another_size_is_made_again(source: Path, size: int, written: list[Path]) -> None:
    copy = converted(source)
    os.truncate(copy.file(), size)
    assert converted(source) == copy
    np.testing.assert_array_equal(copy.open(), images(20).reshape(20, -1))
    assert written == [source, source]


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"path": 1}', "\x00"])
def test_a_damaged_note_is_made_again(
    source: Path, folder: Path, note: str, written: list[Path]
) -> None:
    copy = converted(source)
    [file] = folder.glob("*.json")
    file.write_text(note)
    assert converted(source) == copy
    assert written == [source]


def test_values_are_checked_in_every_piece(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matfile, "PIECE", 4)
    rows = images(10).reshape(10, -1)
    rows[9, 5] = np.nan
    source = save(tmp_path / "DATA_Htestin.mat", rows)
    with pytest.raises(ValueError, match=r"NaN or infinite values, first in row 9"):
        converted(source)
    rows[9, 5], rows[6, 0] = 0.5, 1.5
    save(source, rows)
    with pytest.raises(ValueError, match=r"lies in \[.*, 1.5\] in rows 4 … 7"):
        converted(source)
    assert names(folder) == ["lock"]


def test_a_full_disk_is_noticed_before(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(
        OSError,
        match=rf"{folder}/\w+\.v2\.npy can't be written: No space left .* 163,840 bytes, and 1,000 "
        r"are free.*CSIPIPE_CACHE",
    ):
        converted(source)
    assert names(folder) == ["lock"]


@pytest.mark.parametrize("room", [100, 128 + 4 * 8192, 128 + 10 * 8192])
def test_a_disk_that_fills_up_leaves_nothing(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(matfile, "PIECE", 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # as if there were no more room
    try:
        with pytest.raises(OSError, match=r"File too large.*CSIPIPE_CACHE"):
            converted(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(folder) == ["lock"]


def test_without_locks_every_process_writes_a_file_of_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = images(40)[20:].reshape(20, -1)  # as large as the other
    other = save(tmp_path / "DATA_Hvalin.mat", rows)
    monkeypatch.setattr("csipipe.files.lock", lambda *_, **__: True)
    check = layout.check_images

    def meanwhile(file: Path, *rest: Any) -> None:
        check(file, *rest)
        if file == source:  # another process, on another node, converts another file
            converted(other)

    monkeypatch.setattr(cache, "check_images", meanwhile)
    np.testing.assert_array_equal(converted(source).open(), images(20).reshape(20, -1))
    np.testing.assert_array_equal(converted(other).open(), rows)


def test_what_a_killed_process_left_is_removed_when_nobody_writes_to_it(
    source: Path, folder: Path
) -> None:
    folder.mkdir()
    old, new = folder / "converting.1.partial", folder / "converting.2.partial"
    for file in (old, new):
        file.write_text("half")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    converted(source)
    assert not old.exists()
    assert new.read_text() == "half"


def test_a_cache_that_cannot_be_is_named_with_the_remedy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CSIPIPE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        OSError, match=r"file/cache/lock can't be written: Not a dir.*CSIPIPE_CACHE"
    ):
        converted(source)


def test_a_source_that_changes_meanwhile_is_refused(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(*_: Any) -> None:
        os.utime(source, ns=(0, 0))

    monkeypatch.setattr(cache, "check_images", meddle)
    with pytest.raises(ValueError, match=r"DATA_Htestin\.mat changed while it was being read"):
        converted(source)
    assert names(folder) == ["lock"]


def test_a_missing_source_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        converted(Path("/nowhere/DATA_Htestin.mat"))


def test_a_replaced_source_is_always_noticed(source: Path) -> None:
    """Of the same size and time of modification, whatever way it came."""
    rows = [images(20, seed).reshape(20, -1) for seed in range(5)]
    state = source.stat()

    def in_place(values: Any) -> None:
        content = save(source.with_name("other"), values).read_bytes()
        with source.open("rb+") as file:
            file.write(content)

    def renamed(values: Any) -> None:
        os.replace(save(source.with_name("other"), values), source)

    def removed_first(values: Any) -> None:
        source.unlink()
        save(source, values)

    def linked(values: Any) -> None:
        new = save(source.with_name(f"new{values[0, 0]}"), values)
        os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
        source.unlink()
        source.symlink_to(new)

    ways = (in_place, renamed, removed_first, linked)
    np.testing.assert_array_equal(converted(source).open(), rows[0])
    digests = {cache.digest(source)}
    for way, values in zip(ways, rows[1:], strict=True):
        way(values)
        os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
        now = source.stat()
        assert (now.st_size, now.st_mtime_ns) == (state.st_size, state.st_mtime_ns)
        np.testing.assert_array_equal(converted(source).open(), values, err_msg=way.__name__)
        digests.add(cache.digest(source))
    assert len(digests) == 5


def test_values_a_rounding_apart_are_clipped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = images(70).reshape(70, -1).astype(np.float64)
    rows[3, 7], rows[4, 8], rows[5, 9] = np.nextafter(1.0, 2.0), -1e-17, 1 + 1.2e-7
    source = save(tmp_path / "DATA_Htestin.mat", rows)
    copy = converted(source)
    assert copy.open()[3, 7] == copy.open()[5, 9] == 1.0
    assert copy.open()[4, 8] == 0.0
    said = capsys.readouterr().err
    assert "DATA_Htestin.mat: 3 value(s) a rounding outside of [0, 1] were clipped" in said
    rows[3, 7] = 1 + 2e-6
    with pytest.raises(ValueError, match=r"lies in \[-1e-17, 1\.000002\]"):
        converted(save(source, rows))


def test_what_check_calls_suspicious_is_said_at_conversion_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = SyntheticSource(0, 32, 32).rows("indoor", "test", 0, 100)
    peaks = np.random.default_rng(0).uniform(0.05, 1, (100, 1, 1, 1))
    other = (made - 0.5) * peaks  # a channel, scaled from the least to the greatest value of all
    low, high = other.min(), other.max()
    source = save(
        tmp_path / "DATA_Htestin.mat", ((other - low) / (high - low + 0.2)).reshape(100, -1)
    )
    converted(source)
    said = capsys.readouterr().err
    found = [f"{f.verdict}: {f.what}" for f in examine(source).findings]
    assert any("the median, which stands for zero" in one for one in found)
    for one in found:
        assert one in said
    converted(source)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"DATA_Htestin\.mat: suspicious: .*set data\.accept"):
        converted(source, "good")
    assert not capsys.readouterr().err


def test_values_out_of_range_are_let_in_by_a_setting_and_by_no_copy_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    centred = images(70).reshape(70, -1) - np.float32(0.5)
    source = save(tmp_path / "DATA_Htestin.mat", centred)
    copy = converted(source, "unusable")
    np.testing.assert_array_equal(copy.open(), centred)
    assert f"{source}: unusable: values lie in [-0.5" in capsys.readouterr().err
    assert converted(source, "unusable") == copy
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"add 0\.5 to HT\..*data\.accept to unusable"):
        converted(source)
    centred[3, 5] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        converted(save(source, centred), "unusable")


def test_what_an_earlier_release_found_is_looked_for_again(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = source.resolve(), []

    def judge() -> list[Finding]:
        calls.append(1)
        return []

    sha256 = cache.digest(source)
    for _ in range(2):
        cache.findings(source, sha256, judge)
    assert len(calls) == 1
    [note] = folder.glob("*.findings")
    note.write_text(json.dumps([str(source), sha256, []]))  # had no number
    cache.findings(source, sha256, judge)
    assert len(calls) == 2
    monkeypatch.setattr(cache, "_CHECKS", cache._CHECKS + 1)
    cache.findings(source, sha256, judge)
    assert len(calls) == 3
