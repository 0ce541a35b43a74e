"""What a report's options ask for: fewer seeds, fewer runs, and only those that the data allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from csifiles import channels as made_channels

from csipipe.channels import command as channels_command
from csipipe.reports import command, reproduce, start
from csipipe.reports.runs import Run


def test_fewer_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["headline", "--out", str(tmp_path)]
    assert reproduce.main([*words, "--collect", "--seeds", "1"]) == 0
    page = (tmp_path / "headline.md").read_text()
    assert "-seed0: not started yet" in page
    assert "-seed1" not in page
    assert reproduce.main([*words, "--sbatch", "--seeds", "2"]) == 0
    assert "--seeds 2" in capsys.readouterr().out
    assert reproduce.main([*words, "--collect", "--seeds", "4"]) == 1
    assert (
        "--seeds is 4; preset laptop has 3, so choose a number from 1 to 3."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", sorted({*reproduce.ARRAYS, "accuracy"}))
def test_quick_has_fewer_runs_whatever_the_report(name: str, tmp_path: Path) -> None:
    def count(*more: str) -> int:
        line = [name, "--preset", "laptop", "--out", str(tmp_path), *more]
        options, settings = reproduce.parser().parse_known_args(line)
        options.settings = settings
        return len(reproduce.REPORTS[name].wanted(command.report(options)))

    assert 0 < count("--quick") < count()
    if name in ("bytes", "averaging", "gap"):
        assert 3 * count("--quick") == count()
        assert count("--quick", "--seeds", "2") == 2 * count("--quick")


def test_search_refuses_to_be_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["search", "--quick", "--out", str(tmp_path)]) == 1
    assert "search has no --quick" in capsys.readouterr().err


def test_only_runs_that_fit_the_data_are_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def begin(ready: list[Run], *_: object) -> dict[str, str]:
        started.extend(run.name for run in ready)
        return {}

    monkeypatch.setattr(start, "start", begin)
    np.save(tmp_path / "mine.npy", made_channels())
    convert = ["convert", str(tmp_path / "mine.npy"), str(tmp_path / "one")]
    assert channels_command.main(convert) == 0
    convert[-1] = str(tmp_path / "outdoor")
    assert channels_command.main([*convert, "--environments", "outdoor"]) == 0
    own = ["--model.angles", "8", "--model.delays", "8", "--data.test_samples", "null"]

    def make(report: str, folder: str) -> tuple[int, str]:
        place = ["--data.source", "files", "--data.path", str(tmp_path / folder)]
        code = reproduce.main([report, "--out", str(tmp_path / "out"), *own, *place])
        return code, capsys.readouterr().err

    code, said = make("headline", "one")
    assert (code, started) == (1, [])
    assert "none of the 21 runs can train on these data:\n  this report is on outdoor" in said
    assert "has all. Convert them with --environments outdoor" in said
    assert said.count("Convert them") == 1
    assert "this report is on outdoor channels" in make("gap", "one")[1]
    code, said = make("fig5", "outdoor")
    assert len(started) == 5
    assert all("outdoor" in name for name in started)
    assert "csilocal-indoor-c4-seed0: not started: this report is on indoor channels" in said
    assert "csilocal-noniid-c4-seed0: not started: data.environment is noniid" in said
