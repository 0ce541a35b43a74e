"""Presets: the shipped ones, files of one's own, and settings that only a report may decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import reportruns

from csipipe import models
from csipipe.reports import bytes, command, fig5, fig6, gap, headline, reproduce, start
from csipipe.reports import preset as presets
from csipipe.reports.command import Report
from csipipe.reports.preset import PANELS, PRESETS, REFERENCE


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


@pytest.mark.parametrize("panel", ["b", "d", "f"])
def test_the_laptop_has_the_papers_ratio_of_samples_to_parameters(panel: str) -> None:
    """B against d/(c1 + c2), which decides the comparison."""
    share = {}
    for name in ("paper", "laptop"):
        preset = presets.load(name, user=["--data.source", "csinet", "--data.path", "x"])
        settings = preset.settings("csilocal", *PANELS[panel], 0)
        d = sum(models.count_parts(settings.model).values())
        share[name] = settings.train.batch_size * sum(models.widths(settings.model)) / d
    assert share["laptop"] == pytest.approx(share["paper"], rel=0.02)
