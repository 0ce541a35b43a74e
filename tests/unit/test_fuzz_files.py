"""Files that a run, a report or another program left, damaged: read, or refused by name.

A file may say something else than it did, and be read: digests, where there are any, are asked by
those who read what they are of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import trainedruns
from csifiles import images, save
from fuzzing import CASES, FEWER, damaged, respoiled, seed, spoiled
from reportruns import finish, preset

from csipipe import checkpoint
from csipipe.channels import Manifest, cache, deal, manifest_of, rawarray
from csipipe.channels.format import NAME, Description, Stored, open_rows
from csipipe.channels.synthetic import SyntheticSource
from csipipe.channels.writer import Writer
from csipipe.export.pack import pack
from csipipe.pipeline import balance
from csipipe.reports import curves, runs, table1
from csipipe.reports import preset as presets
from csipipe.run import card, ceiling, lock, trained
from csipipe.run.resuming import CONFIG, decide
from csipipe.run.slurm import FILE, Plan
from csipipe.settings import commandline
from csipipe.settings.config import DataSettings, ModelSettings, Settings

Reader = tuple[Path, Callable[[], object]]


def manifest(folder: Path) -> Reader:
    data = DataSettings(train_samples=12, test_samples=3)
    source = SyntheticSource(0, 8, 8)
    manifest_of(deal(data, 3, source.available, source.environments), 0.1, source).write(folder)
    return folder / "manifest.json", lambda: Manifest.read(folder)


def description(folder: Path) -> Reader:
    with Writer(folder / "x") as out:
        out.add("a", "train", images(3)[:, :, :4, :4])
        out.add("b", "test", images(2)[:, :, :4, :4])
        out.finish(lambda sets: Description(angles=4, delays=4, subcarriers=9, sets=sets))

    def read() -> None:
        said = Description.read(folder / "x")
        for one in said.sets:
            shape = (one.rows, 2, said.angles, said.delays)
            for stored in one.stored():
                open_rows(folder / "x", stored, "<f4", shape)

    return folder / "x" / NAME, read


def handed_on(folder: Path) -> Reader:
    trainedruns.finish(folder / "run")
    pack(trained.read(folder / "run"), [0], torch.rand(3, 2, 8, 8), "CC0", folder / "zoo")
    return folder / "zoo" / card.CARD, lambda: card.check(folder / "zoo", 1)


def ended(folder: Path) -> Reader:
    folder = folder / "run"
    trainedruns.finish(folder)
    settings = commandline.read(["--config", str(folder / CONFIG)])

    def read() -> None:
        ceiling.noted(folder)
        decide(settings, folder, again=False)

    return folder / "summary.json", read


def curve(folder: Path) -> Reader:
    run = runs.make(preset(), folder, "csilocal", "indoor", 8, 0)
    finish(run, [0.5, 0.25], holdout=0.5)
    return run.folder / "history.jsonl", lambda: curves.read(run.folder)


def end_of_curve(folder: Path) -> Reader:
    _, read = curve(folder)
    return next(folder.rglob("summary.json")), read


def cell(folder: Path) -> Reader:
    times = {"seconds": [0.5, 1.0], "settings": {"topology": {"ues": 4}}}
    content = {
        "candidates": {"ours": times, "plain": times},
        "with": "ours",
        "without": "plain",
        "cell": {"environment": "indoor", "c": 256, "batch_size": 400},
    }
    (folder / "cells").mkdir()
    (folder / "cells" / "one.json").write_text(json.dumps(content))
    return folder / "cells" / "one.json", lambda: table1.read(folder)


def plan_of_table1(folder: Path) -> Reader:
    table1.claim(table1.Plan(), folder)
    return folder / "plan.json", lambda: table1.claim(table1.Plan(), folder)


def profile(folder: Path) -> Reader:
    file, model = folder / "profile.json", ModelSettings(angles=8, delays=8, c1=16, c2=16)
    about = balance._about(model, 6, "fp32", torch.device("cpu"))
    file.write_text(json.dumps(about | {"seconds": [0.1, 0.2, 0.3]}))
    return file, lambda: balance._read(file, about, 3)


def plan_of_a_job(folder: Path) -> Reader:
    Plan("12.0", ("a", "b"), (2, 1), "10.0.0.1", 4000, ("--train.lr", "1")).write(folder)
    return folder / FILE, lambda: Plan.read(folder, "12.0", patience=0)


def held(folder: Path) -> Reader:
    (folder / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "today"}))
    return folder / "lock", lambda: lock._in_use(folder / "lock")


READERS = {
    "manifest of rows": manifest,
    "description of channels": description,
    "card": handed_on,
    "summary": ended,
    "learning curve": curve,
    "summary, for a report": end_of_curve,
    "cell of Table I": cell,
    "plan of Table I": plan_of_table1,
    "profile of the tail": profile,
    "plan of a job": plan_of_a_job,
    "lock": held,
}
FOUND = {
    "description of channels": (
        '{"format": "csipipe channels", "version": 1, "angles": 4, "delays": 4, "sets": [{'
        '"environment": "a", "part": "train", "rows": 3, "images": {"name": "a-train.npy", '
        '"bytes": {}, "sha256": ""}}]}',
    ),
    "summary": (
        '{"status": "finished", "iterations": Infinity}',
        '{"status": "finished", "iterations": 1e999}',
    ),
    "learning curve": ('{"iteration": Infinity}',),
    "plan of a job": ("[]", '{"job": "12.0", "nodes": 7}'),
}
"""Texts that once ended in a traceback."""


@CASES
@pytest.mark.parametrize("what", READERS)
def test_what_runs_and_reports_left_is_read_or_refused(
    what: str, cases: int, tmp_path: Path
) -> None:
    file, read = READERS[what](tmp_path)
    read()
    # of another plan, of an end that isn't the curve's, or where a file isn't seen, the folder is
    named = not what.startswith("plan") and what != "summary, for a report"
    good = file.read_text().splitlines()[-1] if file.suffix == ".jsonl" else file.read_text()
    respoiled(good, cases, file, read, named, FOUND.get(what, ()))


@CASES
@pytest.mark.parametrize("ending", [".json", ".sha256", ".findings"])
def test_damaged_notes_of_the_cache_are_made_again(
    ending: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSIPIPE_CACHE", str(tmp_path / "cache"))
    source = save(tmp_path / "DATA_Htestin.mat", images(20).reshape(20, -1)).resolve()
    cache.converted(source)
    sha256 = cache.digest(source)
    cache.findings(source, sha256, list)
    [note] = (tmp_path / "cache").glob(f"*{ending}")
    good, chance = note.read_text(), random.Random(seed(cases))
    for _ in range(cases):
        note.write_text(spoiled(good, chance), errors="surrogatepass")
        cache._noted(source, False)
        cache._noted_digest(note, source)
        cache._noted_findings(note, source, sha256)
    note.write_text("{}")
    assert cache.converted(source).rows == 20
    assert cache.digest(source) == sha256


@FEWER
def test_settings_of_runs_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(commandline.to_yaml(Settings()))
    good = (tmp_path / CONFIG).read_bytes()
    decide(Settings(), tmp_path, again=False)

    def read() -> None:
        decide(Settings(), tmp_path, again=False)

    # what differs is named by the folder
    damaged(good, cases, tmp_path / CONFIG, read, text=True, named=False)


@FEWER
def test_presets_of_reports_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    good = (presets.PRESETS / "laptop.yaml").read_bytes()
    assert 0.1 < damaged(good, cases, file, lambda: presets.load(str(file)), True, False) < 0.95


# arrays


@CASES
def test_weights_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    file = tmp_path / "tail.safetensors"
    checkpoint.save(file, {"tail": {"a": torch.ones(3, 2), "b": torch.tensor(4)}})
    assert damaged(file.read_bytes(), cases, file, lambda: checkpoint.read(file)) > 0.1


@CASES
def test_rows_in_npy_files_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.npy"
    np.save(file, images(3)[:, :, :4, :4])

    def read() -> None:
        stored = Stored(file.name, file.stat().st_size, "")  # of the same length at least
        assert open_rows(tmp_path, stored, "<f4", (3, 2, 4, 4)).shape == (3, 2, 4, 4)

    assert damaged(file.read_bytes(), cases, file, read) > 0.1


def arrays(folder: Path, form: str) -> Path:
    """A file with an array of (3, 4, 5) or, of text, (3, 20)."""
    values = images(3)[:, 0, :4, :5]
    file = folder / f"DATA.{form}"
    if form == "npy":
        np.save(file, values)
    elif form == "npz":
        np.savez_compressed(file, H=values)
    elif form == "csv":
        np.savetxt(file, values.reshape(3, -1), "%.4g", delimiter=",")
    elif form == "pt":
        torch.save({"H": torch.from_numpy(values)}, file)
    elif form == "mat":
        save(file, values.astype(complex), "H", do_compression=True)
    else:
        with h5py.File(file, "w") as stored:
            stored.create_dataset("H", data=values, chunks=(2, 2, 2), compression="gzip")
    return file


@CASES
@pytest.mark.parametrize("form", ["npy", "npz", "csv", "pt", "mat", "h5"])
def test_arrays_of_other_programs_are_read_or_refused(
    form: str, cases: int, tmp_path: Path
) -> None:
    file = arrays(tmp_path, form)

    def read() -> None:
        with rawarray.opened(file) as array:
            if np.prod([float(size) for size in array.shape]) < 1e6:
                values: Any = array.cut(0, 0, array.shape[0])
                assert values.shape == array.shape

    read()
    assert damaged(file.read_bytes(), cases, file, read, text=form == "csv") > 0.1
