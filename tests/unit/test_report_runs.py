"""Runs of reports: named, shared, found, checked, and curves read from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import reportruns
from csifiles import images, save
from reportruns import a_run, finish

from csipipe import channels
from csipipe.reports import array, command, curves, fig5, fig6, headline, runs
from csipipe.reports.command import Report
from csipipe.reports.preset import METHODS, REFERENCE
from csipipe.reports.runs import Run, State
from csipipe.settings.config import DataSettings, Settings


def test_reports_share_runs(tmp_path: Path) -> None:
    one = Report(reportruns.preset(), tmp_path, quick=False, collect=True, jobs=1)
    five, six, head = fig5.wanted(one), fig6.wanted(one), headline.wanted(one)
    assert {r for (_, m), r in six.items() if m == "csilocal"} <= set(five.values())
    assert {r for (_, seed), r in head.items() if seed == 0} <= set(six.values())
    assert len(head) == 3 * len(METHODS)
    names = [r.name for wanted in (five, six, head) for r in wanted.values()]
    assert len(set(names)) == 9 + 48 - 6 + 14  # points, panels less shared, two more seeds


def test_runs_of_one_name_and_other_settings_are_refused(tmp_path: Path) -> None:
    one = a_run(tmp_path)
    other = replace(one.settings, train=replace(one.settings.train, mu=0.5))
    report = Report(reportruns.preset(), tmp_path, quick=False, collect=True, jobs=1)
    both = [one, one, Run(one.name, other)]
    named = rf"two runs of this report are called {one.name}, one with train.mu 0.01, one with 0.5"
    with pytest.raises(ValueError, match=named):
        command.obtain(report, both)
    with pytest.raises(ValueError, match=named):
        array.numbered(both)
    assert array.numbered([one, one]) == [one]


def test_a_method_gets_settings_it_can_use(tmp_path: Path) -> None:
    steps = {m: a_run(tmp_path, m).settings.train.local_steps for m in (*METHODS, REFERENCE)}
    assert {m for m, e in steps.items() if e > 1} == set(METHODS[1:5])


def test_states_of_a_run(tmp_path: Path) -> None:
    finished, interrupted, missing = (a_run(tmp_path, seed=seed) for seed in (0, 1, 2))
    finish(finished, [0.5])
    finish(interrupted, [0.5])
    (interrupted.folder / "summary.json").unlink()
    found = runs.sort([finished, interrupted, missing])
    assert found[State.FINISHED] == [finished]
    assert found[State.INTERRUPTED] == [interrupted]
    assert found[State.MISSING] == [missing]


def test_runs_may_differ_in_where_they_were_computed(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, [0.5])
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace("stages: null", "stages: 4"))
    assert run.state() is State.FINISHED


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.yaml", ("batch_size: 106", "batch_size: 8"), r"train.batch_size 8, .* needs 106"),
        ("config.yaml", ("seed: 0\n  average", "seed: 3\n  average"), "train.seed 3"),
        (
            "config.yaml",
            ("eval_ues: null", "eval_ues: 2"),
            "run.eval_ues 2, this report needs null",
        ),
        ("config.yaml", ("method: csilocal", "- 1"), "holds no settings of a run"),
        ("config.yaml", ("model:", "modell:"), "modell.angles, which is not a setting"),
        ("summary.json", ("finished", "finished\n"), "summary.json can't be read"),
        ("summary.json", ('"iterations": 20', '"iterations": 30'), "ends at iteration 20"),
        ("history.jsonl", ('{"iteration": 20', '{"iteration'), "history.jsonl, line 2 isn't JSON"),
        ("history.jsonl", ('"exchanged"', '"sent"'), "a figure is missing.*exchanged"),
        ("history.jsonl", ('"iteration": 20', '"iteration": 10'), "has iteration 10 after 10"),
    ],
)
def test_damaged_and_foreign_runs_are_named(
    file: str, change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    run = a_run(tmp_path)
    finish(run, [0.6, 0.5])
    path = run.folder / file
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=message) as error:
        runs.sort([run, a_run(tmp_path, seed=1)])
    assert str(run.folder) in str(error.value)


def test_a_folder_without_a_run_is_left_alone(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.folder.mkdir(parents=True)
    assert run.state() is State.MISSING
    (run.folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in the way"):
        run.state()


def test_a_finished_run_without_a_curve_is_named(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, [0.5])
    (run.folder / "history.jsonl").unlink()
    with pytest.raises(ValueError, match=r"history.jsonl is missing"):
        curves.read(run.folder)


def test_a_curve_by_hand(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, [0.8, 0.4, 0.5, 0.3, 0.1], spread=0.2)
    curve = run.curve()
    assert curve.exchange_until(0.6) == pytest.approx(150)  # half-way from 0.8 to 0.4
    assert curve.exchange_until(0.6, "bytes") == pytest.approx(600)
    assert curve.exchange_until(0.4) == 200
    assert curve.exchange_until(0.35) == pytest.approx(375)  # the rise to 0.5 counts for nothing
    assert curve.exchange_until(0.9) == 100  # there at the first evaluation
    assert curve.exchange_until(0.05) is None
    assert curve.end == pytest.approx(0.3)
    assert curve.spread == pytest.approx(0.2)
    assert [curve.loss_at(x) for x in (99, 100, 350)] == [1.0, 0.8, 0.4]


def test_a_finished_run_of_other_rows_is_refused(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "moved", "other")]
    for n, place in enumerate(places):
        place.mkdir()
        for kind, rows in (("train", 40), ("val", 8), ("test", 8)):
            values = images(rows, seed=1 if n == 2 else 0).reshape(rows, -1)
            save(place / f"DATA_H{kind}in.mat", values)

    def of(place: Path) -> Run:
        run = runs.placed("one", Settings(), tmp_path)
        data = DataSettings(source="csinet", path=str(place), environment="indoor")
        model = replace(run.settings.model, angles=32, delays=32)
        return replace(run, settings=replace(run.settings, data=data, model=model))

    first = of(places[0])
    finish(first, [0.5])
    source, dealt = channels.dealt(first.settings)
    channels.manifest_of(dealt, 0.05, source).write(first.folder)
    assert of(places[1]).state() is State.FINISHED
    with pytest.raises(ValueError, match=r"was made with other data than .*other"):
        of(places[2]).state()
