"""A disk that is full: one message with the remedy, nothing half written, and the command again.

Once as a limit on the size of files, which fails every write, and once, as root, as a file system
of its own with a little room left. What training does then is in
`tests/distributed/test_disk_fills.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainedruns

from csipipe import checkpoint, files
from csipipe.__main__ import main
from csipipe.comm.world import World
from csipipe.methods import federated, splitfed
from csipipe.methods.exchange import UeExchange
from csipipe.methods.replica import Agreed
from csipipe.run.folder import claim
from csipipe.run.resuming import CONFIG, Start, decide
from csipipe.settings.config import RunSettings, Settings

ROOM = 32 << 10


@dataclass(frozen=True)
class Disk:
    """A folder, and what makes its disk full for a while."""

    place: Path
    full: Callable[..., AbstractContextManager[None]]

    def left(self) -> set[str]:
        return {path.name for path in self.place.rglob("*")}


@pytest.fixture(params=["limit", pytest.param("file system", marks=pytest.mark.long)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    if request.param == "limit":
        yield Disk(place, limited)
        return
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system: needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no file system can be mounted here")

    @contextlib.contextmanager
    def filled(room: int = ROOM) -> Iterator[None]:
        filler = place / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(place).free - room))
        try:
            yield
        finally:
            filler.unlink()

    try:
        yield Disk(place, filled)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def limited(room: int = 0) -> Iterator[None]:
    """No file may have a byte, as if there were no room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def is_refused(words: list[str], disk: Disk, said: pytest.CaptureFixture[str], **how: int) -> None:
    """One message, which names the disk's file or folder, what was wrong and the remedy."""
    said.readouterr()
    with disk.full(**how):
        assert main(words) == 1
    [line] = [line for line in said.readouterr().err.splitlines() if "csipipe: error:" in line]
    tells(line, disk.place / "out")


def tells(line: str, named: Path) -> None:
    assert str(named) in line
    assert "No space left on device" in line or "File too large" in line
    assert "ake room" in line


@pytest.mark.parametrize(
    "words",
    [
        ["--train", "100", "--val", "0", "--test", "10"],
        ["--model", "indoor", "--train", "20", "--val", "0", "--test", "2"],
    ],
    ids=["CsiNet's files", "a model"],
)
def test_channels_are_generated_whole_or_not_at_all(
    words: list[str], disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["channels", "generate", str(disk.place / "out"), *words]
    is_refused(line, disk, capsys)
    assert disk.left() <= {"out"}
    assert main(line) == 0


def test_results_of_an_evaluation(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = disk.place.parent / "run", disk.place / "out"
    trainedruns.finish(run)
    line = ["evaluate", str(run), "--out", str(out)]
    is_refused(line, disk, capsys)
    assert disk.left() <= {"out", "table.txt"}
    assert main(line) == 0
    assert len(list(out.iterdir())) == 3


@pytest.mark.parametrize("what", ["pt2", pytest.param("onnx", marks=pytest.mark.long), "pack"])
def test_an_export_is_whole_or_not_there(
    what: str, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    run, out = disk.place.parent / "run", disk.place / "out"
    trainedruns.finish(run)
    more = ["--pack", str(out)] if what == "pack" else ["--out", str(out), "--formats", what]
    line = ["export", str(run), "--ue", "0", *more]
    is_refused(line, disk, capsys)
    assert not disk.left()
    assert main(line) == 0


SMALL = ["--model.angles=8", "--model.delays=8", "--model.c1=16", "--data.test_samples=20"]


@pytest.mark.parametrize(
    "words",
    [["reproduce", "headline", "--quick"], ["compare", "--models=linear", "--c=8", *SMALL]],
    ids=["reproduce", "compare"],
)
def test_reports_start_no_run_that_they_cannot_describe(
    words: list[str], disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    is_refused([*words, "--out", str(disk.place / "out")], disk, capsys, room=0)
    assert not [name for name in disk.left() if name.endswith((".yaml", ".partial"))]


def test_sbatch_scripts_are_copied_all_or_none(
    disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["slurm", "--copy", str(disk.place / "out")]
    is_refused(line, disk, capsys, room=8192)
    assert not disk.left()
    assert main(line) == 0


def test_a_run_that_could_not_begin_begins_afterwards(disk: Disk) -> None:
    """Half of a `config.yaml` would be the run of other settings."""
    folder = disk.place / "out"
    settings = Settings(run=RunSettings(dir=str(folder)))
    with disk.full(room=0), pytest.raises(OSError, match="ake room") as refusal:
        claim(decide(settings, folder, again=False), settings, World.alone())
    tells(str(refusal.value), folder)
    assert not (folder / CONFIG).exists()
    start, lock = claim(decide(settings, folder, again=False), settings, World.alone())
    assert start == Start(folder)
    lock.release()


def test_weights_and_lines_name_their_file(disk: Disk) -> None:
    file = disk.place / "out" / "some.safetensors"
    state = {"head": {"weight": torch.zeros(ROOM)}}
    with disk.full():
        with pytest.raises(OSError, match=r"\d") as refusal:
            checkpoint.save(file, state)
        tells(files.in_words(refusal.value), file)
        with pytest.raises(OSError, match=r"\d") as refusal:
            files.add_line(file.with_name("rounds"), "x" * 2 * ROOM)
        tells(files.in_words(refusal.value), file.with_name("rounds"))
    assert not file.exists()
    checkpoint.save(file, state)
    assert checkpoint.read(file)["head.weight"].shape == (ROOM,)


def test_a_place_that_isnt_ours_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    for number, able in ((errno.EROFS, "written"), (errno.EACCES, "read or written")):
        said = files.in_words(OSError(number, os.strerror(number), str(file)))
        assert said.startswith(f"{file} can't be {able}: {os.strerror(number)}. Choose another")


@pytest.mark.parametrize("half", [federated.UeHalf, splitfed.UeHalf])
def test_what_ues_are_lent_for_a_save_that_fails_is_in_no_checkpoint(half: Any) -> None:
    own, lent = torch.zeros(3), torch.ones(3)
    agreed = Agreed([own])
    exchange = UeExchange.__new__(UeExchange)  # of no role
    exchange._lent = [(agreed, agreed.lend(lent))]
    assert torch.equal(own, lent)
    half.units(SimpleNamespace(exchange=exchange, replicas={}, ues=[]))
    assert torch.equal(own, torch.zeros(3))
    assert not exchange._lent
