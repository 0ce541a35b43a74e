"""The report on accuracy: budgets, the page, the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import reportruns
import trainedruns

from csipipe.evaluation import samples, testset
from csipipe.reports import accuracy, budget, reproduce, runs, start
from csipipe.reports.accuracy import Reached
from csipipe.reports.command import Report
from csipipe.reports.curves import Curve
from csipipe.reports.runs import Run
from csipipe.run import trained as trained_runs
from csipipe.settings.config import ModelSettings, Settings, suited


def reached(method: str, seed: int, nmse_db: float) -> Reached:
    return Reached(
        method=method,
        cell=("indoor", 256),
        seed=seed,
        nmse_db=nmse_db,
        rho=0.9,
        sgcs=math.nan,
        ceiling_db=-15.5,
        iterations=1000,
        rows=256_000,
        seconds=60.0,
    )


def two(tmp_path: Path) -> list[Run]:
    preset = reportruns.preset()
    return [runs.make(preset, tmp_path, "csilocal", "indoor", 8, seed) for seed in (0, 1)]


def trained(seconds: float, started: list[str]) -> object:
    """Stands in for training: leaves what a short run leaves."""

    def train(probes: Sequence[Run]) -> None:
        for probe in probes:
            started.append(probe.name)
            assert probe.settings.data.test_samples == budget.EVALUATED
            reportruns.finish(probe, [0.5])
            file = probe.folder / "summary.json"
            file.write_text(
                json.dumps(json.loads(file.read_text()) | {"seconds_per_iteration": seconds})
            )

    return train


def test_runs_of_a_kind_are_measured_once_and_get_the_same_iterations(tmp_path: Path) -> None:
    started: list[str] = []
    found = budget.within(two(tmp_path), 0.5, tmp_path, trained(0.25, started))  # type: ignore[arg-type]
    assert started == ["probe-csilocal-indoor-c16-seed0"]
    assert [run.settings.train.iterations for run in found] == [120, 120]


def test_every_method_is_measured_by_itself(tmp_path: Path) -> None:
    started: list[str] = []
    preset = reportruns.preset()
    wanted = [runs.make(preset, tmp_path, m, "indoor", 8, 0) for m in ("csilocal", "fedavg")]
    budget.within(wanted, 0.5, tmp_path, trained(0.25, started))  # type: ignore[arg-type]
    assert started == ["probe-csilocal-indoor-c16-seed0", "probe-fedavg-indoor-c16-seed0"]


@pytest.mark.parametrize("holdout", [0.1, 0.0])
def test_the_weights_are_those_that_were_best_on_held_out_rows(
    holdout: float, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "run"
    worker = trainedruns.finish(folder, data={"holdout": holdout})
    summary = json.loads((folder / "summary.json").read_text()) | {"seconds_per_iteration": 0.5}
    pca = {"components": 16, "rows": 72, "nmse_db": -9.0, "bound": not holdout}
    (folder / "summary.json").write_text(json.dumps(summary | {"ceiling": pca}))
    last = trained_runs.read(folder)
    worker.train_iteration(0)
    worker.save_weights(folder / "checkpoints" / "best")
    rows = testset.load(last.settings)
    weights = last if not holdout else trained_runs.read(folder, weights="best")
    settings = worker.settings
    settings = replace(
        settings,
        topology=replace(settings.topology, participants=3),
        train=replace(settings.train, batch_size=8, micro_batches=2),
    )
    found = accuracy.measure(runs.placed("run", settings, tmp_path), rows, ("indoor", 24))
    other = samples.means(
        trained_runs.read(folder, weights="best" if not holdout else "last"), rows
    )
    assert found.nmse_db == 10 * math.log10(samples.means(weights, rows)["nmse"])
    assert found.nmse_db != 10 * math.log10(other["nmse"])
    assert found.seconds == 0.5 * 10
    assert found.rows == 10 * 3 * 8
    # PCA of few rows is no ceiling of a model that can beat it
    assert found.ceiling_db == -9 if not holdout else math.isnan(found.ceiling_db)


def test_what_needs_more_iterations_or_rows_than_a_probe_has_is_left_out(tmp_path: Path) -> None:
    one = two(tmp_path)[0]
    settings = replace(
        Settings(**suited("splitfed", vars(one.settings))),
        data=replace(one.settings.data, test_samples=5),
        train=replace(one.settings.train, iterations=300, personal_iterations=50),
        run=replace(one.settings.run, profile=True, profile_after=20),
    )
    asked: list[Run] = []
    budget.within([replace(one, settings=settings)], 1, tmp_path, asked.extend)
    [probe] = asked
    assert probe.settings.train.iterations == budget.PROBED
    assert probe.settings.data.test_samples == 5


def test_a_budget_shorter_than_an_iteration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget of 3 s is shorter than one iteration"):
        budget.within(two(tmp_path), 0.05, tmp_path, trained(4.0, []))  # type: ignore[arg-type]
    found = budget.within(two(tmp_path), 0.1, tmp_path, lambda _: None)  # 6 s; measured already
    assert [run.settings.train.iterations for run in found] == [1, 1]


def test_runs_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    assert budget.within(two(tmp_path), 1, tmp_path, lambda _: None) == []


def test_runs_that_were_not_measured_are_named_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "start", lambda ready, *_: {run.name: "killed" for run in ready})
    for more, code in (["--collect"], 0), ([], 1):
        words = ["accuracy", "--preset", "laptop", "--seeds", "1", "--out", str(tmp_path), *more]
        assert reproduce.main(words) == code
        page = (tmp_path / "accuracy.md").read_text()
        assert "- fedavg-indoor-c4-seed0: the short run that measures" in page
        assert "0 of 0" not in capsys.readouterr().err


def test_a_number_is_a_number_of_iterations(tmp_path: Path) -> None:
    report = Report(reportruns.preset(), tmp_path, quick=False, collect=False, jobs=1)
    found = accuracy.parse("50")(two(tmp_path), report)
    assert [run.settings.train.iterations for run in found] == [50, 50]


@pytest.mark.parametrize(("text", "minutes"), [("90s", 1.5), ("30m", 30), ("2h", 120)])
def test_a_time_has_a_unit(
    text: str, minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr(budget, "within", lambda asked, minutes, *_: given.append(minutes))
    report = Report(reportruns.preset(), tmp_path, quick=False, collect=False, jobs=1)
    accuracy.parse(text)([], report)
    assert given == [minutes]


@pytest.mark.parametrize("text", ["", "0", "0m", "-3m", "3d", "m", "1e3"])
def test_budgets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a time such as"):
        accuracy.parse(text)


def test_the_page_has_medians_ceilings_and_what_is_published() -> None:
    found = [reached("csilocal", s, x) for s, x in enumerate((-13.0, -14.0, -12.0))]
    settings = Settings(model=ModelSettings(angles=32, delays=32))
    page = accuracy.text([*found, reached("centralised", 0, -15.0)], "2h", settings, "")
    assert "| CSILocal | -13.00 (-14.00 … -12.00) | 0.900 |  | -15.50 | 1,000 | 256,000 |" in page
    assert "| centralised | -15.00 |" in page
    assert "CRNet, 2,500 epochs: -16.01 dB" in page
    assert "2h of training" in page
    smaller = Settings(model=ModelSettings(angles=16, delays=8))
    assert "Published" not in accuracy.text(found, "50", smaller, "")


def test_the_picture_has_a_panel_per_cell_and_the_ceiling() -> None:
    curve = Curve([10, 20], [1, 2], [4, 8], [0.5, 0.4], [[0.5], [0.4]], [-1.0, -2.0], [None] * 2, 1)
    cells = [("indoor", 256), ("outdoor", 256)]
    curves = {("csilocal", cell, 0): curve for cell in cells}
    figure = accuracy.draw(curves, {"csilocal": 256.0}, [reached("csilocal", 0, -13.0)])
    first, second = figure.axes
    line, bound = first.lines
    assert list(line.get_xdata()) == [2560, 5120]  # type: ignore[arg-type]
    assert list(bound.get_ydata()) == [-15.5, -15.5]  # type: ignore[arg-type]
    assert len(second.lines) == 1
