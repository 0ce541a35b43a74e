"""Processes that share converted files: killed ones, several at once, and the memory of each."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import io

from csipipe.channels import cache, matfile, open_source
from csipipe.channels.cache import converted
from csipipe.files import cache_folder
from csipipe.settings.config import DataSettings

_CONTEXT = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CSIPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(path: Path, count: int) -> Path:
    """A file of so many random rows."""
    rows = np.random.default_rng(0).random((count, 2048), np.float32)
    io.savemat(path, {"HT": rows})
    return path


def run(function: Callable[..., None], *arguments: Any, count: int = 1) -> list[int | None]:
    """Exit codes of `count` processes that run `function(*arguments)` at once."""
    processes = [_CONTEXT.Process(target=function, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def die_at_the_second_piece(source: Path) -> None:
    def check(path: Path, values: Any, first: int, unbounded: bool = False) -> None:
        if first:
            os._exit(7)

    cache.check_images = check  # type: ignore[attr-defined]
    converted(source)


def test_a_killed_conversion_is_made_up_for(tmp_path: Path, folder: Path) -> None:
    source = made(tmp_path / "DATA_Htrainin.mat", 5000)
    assert run(die_at_the_second_piece, source) == [7]
    [partial] = folder.glob("converting.*.partial")
    assert sorted(folder.iterdir()) == [partial, folder / "lock"]
    assert partial.stat().st_size > 4096 * 8192
    os.utime(partial, (0, 0))  # long ago
    copy = converted(source)
    np.testing.assert_array_equal(copy.open(), io.loadmat(source)["HT"])
    assert not partial.exists()


def convert_and_note(source: Path, notes: Path, barrier: Any) -> None:
    read = matfile.read_rows

    def spy(*arguments: Any, **options: Any) -> Any:
        with notes.open("a") as file:
            file.write("x")
        return read(*arguments, **options)

    cache.read_rows = spy  # type: ignore[attr-defined]
    barrier.wait(60)
    copy = converted(source)
    assert copy.is_whole()
    assert len(copy.open()) == 5000


def test_of_several_processes_one_converts(tmp_path: Path, folder: Path) -> None:
    source, notes = made(tmp_path / "DATA_Htrainin.mat", 5000), tmp_path / "notes"
    codes = run(convert_and_note, source, notes, _CONTEXT.Barrier(3), count=3)
    assert codes == [0, 0, 0]
    assert notes.read_text() == "x"
    assert len(list(folder.iterdir())) == 4  # copy, its note, what the doctor found, lock


def convert_with_little_room(source: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    with pytest.raises(OSError, match=r"File too large.* takes 4,096,000 bytes.*CSIPIPE_CACHE"):
        converted(source)
    assert [path.name for path in cache_folder().iterdir()] == ["lock"]


def test_a_refused_write_leaves_nothing(tmp_path: Path) -> None:
    assert run(convert_with_little_room, made(tmp_path / "DATA_Htrainin.mat", 500)) == [0]


def own_memory() -> int:
    """Bytes of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return 1024 * (sizes["Private_Clean"] + sizes["Private_Dirty"])


def load_a_share(folder: Path, share: int) -> None:
    source = open_source(DataSettings(source="csinet", path=str(folder)), 32, 32)
    source.rows("indoor", "train", 0, 1)
    before = own_memory()
    rows = source.rows("indoor", "train", share, 2 * share)
    assert rows.nbytes == share * 8192
    assert own_memory() - before < rows.nbytes + 16 * 2**20


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_a_process_holds_its_share_only(tmp_path: Path) -> None:
    converted(made(tmp_path / "DATA_Htrainin.mat", 12_000))  # 98 MB
    assert run(load_a_share, tmp_path, 1000) == [0]
