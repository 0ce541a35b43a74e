"""Runs of reports: named, shared, found, checked, started, and curves read from them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reportruns
from csifiles import channels as made_channels
from csifiles import images, save
from reportruns import finish

from csipipe import channels, files, models
from csipipe.channels import command as channels_command
from csipipe.comm.topology import Topology
from csipipe.reports import (
    array,
    bytes,
    command,
    curves,
    fig5,
    fig6,
    gap,
    headline,
    reproduce,
    runs,
    start,
)
from csipipe.reports import preset as presets
from csipipe.reports.command import Report
from csipipe.reports.preset import METHODS, PRESETS, REFERENCE
from csipipe.reports.runs import Run, State
from csipipe.settings.config import DataSettings, Settings, TopologySettings, suited


def a_run(out: Path, method: str = "csilocal", seed: int = 0) -> Run:
    return runs.make(reportruns.preset(), out, method, "outdoor", 4, seed)


def report(out: Path) -> Report:
    return Report(reportruns.preset(), out, quick=False, collect=True, jobs=1)


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
@pytest.mark.parametrize("quick", [False, True])
def test_every_shipped_preset_gives_runs(name: str, quick: bool, tmp_path: Path) -> None:
    if name.endswith("-rates"):
        pytest.skip("learning rates, no preset")
    preset = presets.load(name, quick, ["--data.source", "csinet", "--data.path", "x"])
    one = Report(preset, tmp_path, quick=quick, collect=True, jobs=1)
    for wanted in (fig5.wanted(one), fig6.wanted(one), headline.wanted(one)):
        assert wanted
        assert {run.settings.data.path for run in wanted.values()} == {"x"}


def test_the_paper_preset_has_the_papers_points(tmp_path: Path) -> None:
    preset = presets.load("paper", user=["--data.path", "x"])
    one = Report(preset, tmp_path, quick=False, collect=True, jobs=1)
    settings = [run.settings for run in fig5.wanted(one).values()]
    assert sorted({s.model.c1 for s in settings}) == [32, 64, 128, 256, 512]
    for s in settings:
        assert (s.model.c1, s.topology.ues, s.train.batch_size) == (s.model.c2, 10, 800)
        assert (s.train.lr, s.train.iterations) == (8e-5, 20_000)
    assert {r.settings.model.c1 for r in fig6.wanted(one).values()} == {256, 512}
    assert len(fig6.wanted(one)) == 48
    assert preset.loss == 1.3e-3


def test_the_generated_preset_exchanges_what_the_paper_did(tmp_path: Path) -> None:
    preset = presets.load("generated")
    one = Report(preset, tmp_path, quick=False, collect=True, jobs=1)
    for (method, _), run in headline.wanted(one).items():
        of, sizes = run.settings, models.count_parts(run.settings.model)
        assert (of.topology.ues, of.train.batch_size, of.data.environment) == (10, 800, "outdoor")
        each = 2 * 800 * (512 + 512) if method == "csilocal" else 2 * sum(sizes.values())
        scalars = 10 * each * of.train.iterations
        assert scalars == pytest.approx(headline.PAPER_TOTALS[method], rel=1e-5)
        assert "--nproc_per_node=1" in start.command(run, tmp_path / "c.yaml", preset.processes)


def test_iterations_by_method_are_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.iterations is among the settings to pass on"):
        presets.load("generated", user=["--train.iterations", "9"])
    with pytest.raises(ValueError, match="fedbest"):
        replace(reportruns.preset(), iterations={"fedbest": 9})


def test_the_users_processes_win_over_the_presets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["accuracy", "--out", str(tmp_path), "--processes"]
    options, settings = reproduce.parser().parse_known_args([*words, "1"])
    options.settings = settings
    assert presets.load("accuracy").processes > 1
    assert command.report(options).preset.processes == 1
    assert reproduce.main([*words, "0", "--collect"]) == 1
    assert "--processes is 0; it must be at least 1" in capsys.readouterr().err


def test_reports_share_runs(tmp_path: Path) -> None:
    one = report(tmp_path)
    five, six, head = fig5.wanted(one), fig6.wanted(one), headline.wanted(one)
    assert {r for (_, m), r in six.items() if m == "csilocal"} <= set(five.values())
    assert {r for (_, seed), r in head.items() if seed == 0} <= set(six.values())
    assert len(head) == 3 * len(METHODS)
    names = [r.name for wanted in (five, six, head) for r in wanted.values()]
    assert len(set(names)) == 9 + 48 - 6 + 14  # points, panels less shared, two more seeds


def test_runs_of_one_name_and_other_settings_are_refused(tmp_path: Path) -> None:
    one = a_run(tmp_path)
    other = replace(one.settings, train=replace(one.settings.train, mu=0.5))
    both = [one, one, Run(one.name, other)]
    named = rf"two runs of this report are called {one.name}, one with train.mu 0.01, one with 0.5"
    with pytest.raises(ValueError, match=named):
        command.obtain(report(tmp_path), both)
    with pytest.raises(ValueError, match=named):
        array.numbered(both)
    assert array.numbered([one, one]) == [one]


def test_a_method_gets_settings_it_can_use(tmp_path: Path) -> None:
    steps = {m: a_run(tmp_path, m).settings.train.local_steps for m in (*METHODS, REFERENCE)}
    assert {m for m, e in steps.items() if e > 1} == set(METHODS[1:5])


@pytest.mark.parametrize(
    ("topology", "processes", "ranks"),
    [
        ({}, 3, (3, 3, 1)),
        ({}, 2, (3, 2, 1)),
        ({}, 1, (1, 1, 1)),
        ({"placement": "together"}, 2, (2, 2, 1)),
        ({"placement": "apart"}, 1, (3, 2, 1)),
        ({"placement": "together", "ues": 1}, 4, (1, 1, 1)),
        ({"placement": "together", "ues": 2, "stages": 1}, 4, (2, 2, 1)),
    ],
)
def test_a_run_has_as_many_ranks_as_are_wanted_and_it_can_use(
    topology: dict[str, Any], processes: int, ranks: tuple[int, int, int], tmp_path: Path
) -> None:
    found = []
    for method in ("csilocal", "fedavg", REFERENCE):
        sections = vars(Settings(topology=TopologySettings(**topology)))
        settings = Settings(**suited(method, sections))
        line = start.command(Run("one", settings), tmp_path / "c.yaml", processes)
        found += [int(word.split("=")[1]) for word in line if "nproc" in word]
        if settings.stages:
            Topology.of(settings, found[-1])
    assert tuple(found) == ranks


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (["--train.lr", "1"], "train.lr is among the settings to pass on"),
        (["--method=fedavg"], "method is among"),
        (["--data.environment", "noniid"], "data.environment is among"),
        (["--train.bogus", "1"], "train.bogus"),
    ],
)
def test_settings_that_a_report_decides_are_refused(user: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.load("laptop", user=user)


@pytest.mark.parametrize(
    ("report", "user", "key"),
    [
        ("bytes", ["--comm.topk", "0.2"], "comm.topk"),
        ("bytes", ["--comm.noise", "0.1"], "comm.noise"),
        ("bytes", ["--comm.codec.smashed", "int4"], "comm.codec.smashed"),
        ("averaging", ["--train.aggregate_every", "3"], "train.aggregate_every"),
        ("averaging", ["--train.personal_iterations", "3"], "train.personal_iterations"),
        ("gap", ["--run.eval_ues", "1"], "run.eval_ues"),
        ("search", ["--train.iterations", "9"], "train.iterations"),
        ("accuracy", ["--train.iterations", "9"], "train.iterations"),
        ("averaging", ["--comm.topk", "0.2"], ""),
        ("bytes", ["--train.lr_schedule", "cosine"], ""),
    ],
)
def test_a_report_refuses_what_it_sets_itself(
    report: str,
    user: list[str],
    key: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [report, "--preset", "laptop", "--out", str(tmp_path / "out"), *user]
    if not key:
        options, settings = reproduce.parser().parse_known_args(line)
        options.settings = settings
        command.report(options)
        return
    assert reproduce.main([*line, "--collect"]) == 1
    assert f"{key} is among the settings to pass on, but a report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_are_refused_in_the_name_of_methods_that_a_report_has(tmp_path: Path) -> None:
    """The laptop preset has train.local_steps 2, which CSILocal and the unsplit model don't take;
    starts by PCA are for these two alone."""
    user = ["--model.start", "pca", "--train.stacked", "always", "--model.angles", "8"]
    preset = presets.load("laptop", user=[*user, "--model.delays", "8"])
    one = Report(replace(preset, compression=(4,), seeds=(0,)), tmp_path, False, True, 1)
    made = gap.wanted(one)
    assert {run.settings.model.start for run in made.values()} == {"pca"}
    stacked = {run.settings.method: run.settings.train.stacked for run in made.values()}
    assert stacked == {"csilocal": "always", REFERENCE: "auto"}
    with pytest.raises(ValueError, match=r"model\.start is pca and method fedavg"):
        bytes.wanted(one)


def test_a_size_that_a_ratio_does_not_divide_is_refused() -> None:
    preset = presets.load("laptop", user=["--model.angles", "12", "--model.delays", "12"])
    with pytest.raises(ValueError, match="288 reals, which the compression ratio 1/64"):
        preset.settings("csilocal", "indoor", 64, 0)


NEEDED = "processes: 3\ncompression: [4]\nseeds: [0]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "mine.yaml is not a preset"),
        ("settings: {model", "mine.yaml is not a preset"),
        ("processes: 3", "mine.yaml is not a preset.*required: compression"),
        (f"{NEEDED}colour: blue", "mine.yaml is not a preset.*'colour'"),
        (f"{NEEDED}panels: [g]", "preset mine: unknown panel 'g'"),
        (f"{NEEDED}seeds: [a]", '(?s)mine.yaml is not a preset.*"seeds".*int.* a'),
        (f"{NEEDED}headline: [foo]", "foo"),
        (f"{NEEDED}search: {{panel: f}}", "(?s)mine.yaml is not a preset.*required: grid, seeds"),
    ],
)
def test_files_that_are_no_presets_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        presets.load(str(file))


def test_unknown_presets_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known presets: accuracy, generated, laptop"):
        presets.load("desktop")


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


def program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Runs are `python -c code NAME` instead of a torchrun."""

    def command(run: Run, *_: Any) -> list[str]:
        return [sys.executable, "-c", code, run.name]

    monkeypatch.setattr(start, "command", command)


def test_a_failing_run_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; sys.exit('csipipe: error: no luck' if 'seed1' in sys.argv[1] else 0)"
    program(monkeypatch, code)
    asked = [a_run(tmp_path, seed=seed) for seed in (0, 1, 2)]
    failed = start.start(asked, tmp_path, 3, jobs=2)
    assert list(failed) == [asked[1].name]
    assert failed[asked[1].name].startswith("no luck (see ")
    shown = capsys.readouterr().err
    assert shown.count(" of 3: ") == 3
    assert f"{asked[1].name}: FAILED: no luck" in shown


def test_an_interruption_ends_the_runs_that_were_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "going"
    program(
        monkeypatch,
        f"import time, os; open({str(mark)!r}, 'w').write(str(os.getpid()));time.sleep(60)",
    )

    def interrupt() -> None:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        start.start([a_run(tmp_path), a_run(tmp_path, seed=1)], tmp_path, 3)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent")
def test_a_killed_report_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    asked = [a_run(tmp_path)], tmp_path, 3
    report = multiprocessing.get_context("fork").Process(target=start.start, args=asked)
    report.start()
    log = wait_for(lambda: next(tmp_path.glob("logs/*.log"), None))
    run = wait_for(lambda: int(log.read_text() or 0))
    os.kill(run, 0)
    report.kill()
    report.join()
    wait_for(lambda: ended(run))


def ended(process: int) -> bool:
    """Whether it is gone, or nobody has asked yet how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(look: Callable[[], Any]) -> Any:
    """What it finds, within 30 seconds."""
    end = time.monotonic() + 30
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_two_reports_do_not_start_runs_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(monkeypatch, "")
    with (tmp_path / "lock").open("w") as held:
        assert files.lock(held.fileno())
        with pytest.raises(ValueError, match="another report is starting"):
            start.start([a_run(tmp_path)], tmp_path, 3)
    assert start.start([a_run(tmp_path)], tmp_path, 3) == {}


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
