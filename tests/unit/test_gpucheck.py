"""gpucheck's own machinery: what was found stays, what runs too long or is cut short is ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from csipipe.gpucheck import command, compiling, versions
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import settings
from csipipe.gpucheck.steps import STEPS, Planned

VERSIONS = next(step for step in STEPS if step.name == "versions")


def test_its_runs_know_the_size_of_their_images(tmp_path: Path) -> None:
    assert settings(tmp_path, {"model.c1": 16}).model.image == (2, 32, 32)


def test_an_unknown_step_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path / "out"), "--steps", "split,spilt"]
    assert command.main(arguments) == 2
    assert "names spilt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kernels_that_take_too_long_to_compile_end_no_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The steps that need them compile them."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        monkeypatch.setattr(pool, "map_async", lambda *_: pool.apply_async(time.sleep, (60,)))
        context = SimpleNamespace(Pool=lambda _: pool)
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
        monkeypatch.setattr(compiling, "find_spec", lambda _: True)
        step = Step(torch.device("cuda"), tmp_path, 2.2)
        compiling.run(step)
    (row,) = step.rows
    assert row.found == "not all within 0 s"
    assert row.ok is None


def test_a_machine_without_a_gpu_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_what_was_found_is_on_the_page_when_the_step_is_cut_short(tmp_path: Path) -> None:
    check = command.Check(tmp_path / "out", tmp_path / "work", "cpu", 60.0)
    check.start(VERSIONS)
    [running] = check.running
    step = Step(torch.device("cpu"), running.folder, 60.0)
    step.add("a figure", "7 ms", "≤ 5 ms", ok=False)
    running.limit = 0.0
    check.wait()
    assert not psutil.pid_exists(running.process.pid)
    page = (tmp_path / "out" / "page.md").read_text()
    assert "stopped at its limit of 0 s" in page
    assert "| a figure | 7 ms | ≤ 5 ms | **no** |" in page
    assert not check.all_hold
    assert json.loads((tmp_path / "out" / "found.json").read_text())[0]["rows"]


def test_a_step_ends_with_the_command(tmp_path: Path) -> None:
    check = command.Check(tmp_path / "out", tmp_path / "work", "cpu", 60.0)
    check.start(VERSIONS)
    check.stop()
    assert not psutil.pid_exists(check.running[0].process.pid)
    assert "stopped with the command" in (tmp_path / "out" / "page.md").read_text()


def test_what_there_is_no_time_for_is_on_the_page(tmp_path: Path) -> None:
    check = command.Check(tmp_path / "out", tmp_path / "work", "cpu", 1.0)
    check.start(Planned("late", "A late step", "versions:run", 5.0))
    check.write()
    assert not check.running
    assert "## A late step: no time was left" in (tmp_path / "out" / "page.md").read_text()


def test_the_command_says_where_its_page_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command.main(["--device", "cpu", "--minutes", "0", "--out", str(out)])
    assert capsys.readouterr().out == f"{out / 'page.md'}\n"
    assert (out / "page.md").is_file()


def test_files_that_a_step_keeps_lie_beside_the_page(tmp_path: Path) -> None:
    check = command.Check(tmp_path / "out", tmp_path / "work", "cpu", 60.0)
    folder = tmp_path / "work" / "curve"
    folder.mkdir()
    made = folder / "history.jsonl"
    made.write_text("{}\n")
    Step(torch.device("cpu"), folder, 5.0).keep(made)
    check.write()
    assert (tmp_path / "out" / "history.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("cc (Debian 12.2.0-14) 12.2.0\nThis is free software.\nThere is NO warranty.\n", 0),
        ("nvcc: NVIDIA (R)\nBuilt on Aug_20\nrelease 13.0, V13.0.88\nBuild cuda_13.0\n", 2),
    ],
)
def test_a_compilers_version_is_the_line_that_has_one(
    said: str, wanted: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    compiler.chmod(0o755)
    assert versions._compiler("cc") == said.splitlines()[wanted]
    assert versions._compiler("no-such-compiler") == "no no-such-compiler"
