"""Directories of runs: locks, names, and paths that can be followed from anywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from csipipe.comm.world import World
from csipipe.run import lock, slurm
from csipipe.run.folder import anywhere, claim, new_folder
from csipipe.run.resuming import Start
from csipipe.settings.config import DataSettings, ModelSettings, RunSettings, Settings
from csipipe.tracking.tables import closing_table

HOLD = "import sys; from pathlib import Path; from csipipe.run.lock import Lock; " + (
    "held = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by a live run .process {holder.pid} on"):
            lock.check(tmp_path)
        with pytest.raises(ValueError, match="in use"):
            lock.Lock(tmp_path)
        holder.kill()
        holder.wait()
    lock.check(tmp_path)
    lock.Lock(tmp_path).release()


def test_a_lock_of_another_node_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "WATCH", 0.4)
    monkeypatch.setattr(lock, "BEAT", 0.2)
    file = tmp_path / "lock"
    file.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "now"}))
    ended = threading.Event()

    def live() -> None:
        while not ended.is_set():
            time.sleep(0.05)
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(ValueError, match="on elsewhere"):
        lock.Lock(tmp_path)
    ended.set()
    thread.join()
    said = capsys.readouterr().err
    assert said.endswith("was used by process 1 on elsewhere; waiting 0.4 s for a sign of life\n")
    lock.Lock(tmp_path).release()  # it shows no life any more


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("csilocal", "fedavg-indoor"),
        ("crnet", "fedavg-crnet-indoor"),
        ("mine.models:build", "fedavg-mine.models-build-indoor"),
    ],
)
def test_a_runs_name_says_which_model_it_trains(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(method="fedavg", model=ModelSettings(name=model))
    assert re.fullmatch(rf"{name}-\d{{8}}-\d{{6}}", new_folder(settings).name)
    job = {"SLURM_JOB_ID": "12"}
    assert slurm.folder_of(settings, job) == Path(f"runs/{name}-job12")


def test_two_runs_of_one_second_get_a_directory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    name = new_folder(settings)
    one, first = claim(Start(name), settings, World.alone())
    assert one.folder == name
    # both looked before either took it, or the second a moment later
    other, second = claim(Start(name), settings, World.alone())
    assert len({name, other.folder, new_folder(settings)}) == 3
    assert (other.folder / "config.yaml").is_file()
    first.release()
    third = claim(Start(name), settings, World.alone())[1]  # held a run, which has ended
    lock.check(name)  # and is left alone
    for held in (second, third):
        held.release()
    given = replace(settings, run=RunSettings(dir=str(name)))
    with pytest.raises(ValueError, match="already holds a run"):
        claim(Start(name), given, World.alone())


def test_paths_are_kept_so_that_they_can_be_followed_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataSettings(source="csinet", path="files")
    kept = anywhere(Settings(data=data, run=RunSettings(resume="old")))
    assert (kept.data.path, kept.run.resume) == (f"{tmp_path}/files", f"{tmp_path}/old")
    assert anywhere(Settings()) == Settings()


def test_paths_are_quoted_where_they_are_to_be_typed(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    held = lock.Lock(folder)
    with pytest.raises(ValueError, match="in use") as refusal:
        lock.Lock(folder)
    held.release()
    assert f"`touch '{folder}/stop'`" in str(refusal.value)
    nothing = {unit: {"up": 0, "down": 0} for unit in ("scalars", "bytes")}
    ended = {"status": "stopped", "iterations": 1, "seconds_per_iteration": 1, "seconds_total": 1}
    found = {"test": None, "exchanged": nothing, "exchanged_buffers": nothing}
    text = closing_table({**ended, **found, "dropped": [], "joined": []}, Settings(), folder)
    assert f"--run.dir '{folder}'" in text
    assert f"tensorboard --logdir '{folder}'" in text
