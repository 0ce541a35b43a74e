"""Figures of trained models: by hand, among ranks, on other data, side by side."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainedruns
from csifiles import images, save
from matplotlib.figure import Figure
from runs import CPU
from torch import Tensor, nn

from csipipe import plotting
from csipipe.channels.csinet import NO_FILE, SMALLER
from csipipe.evaluation import command, samples, table, testset
from csipipe.evaluation.summary import Evaluated
from csipipe.evaluation.testset import Rows
from csipipe.measure import metrics
from csipipe.run import trained
from csipipe.settings.commandline import RunParser
from csipipe.settings.config import DataSettings, ModelSettings, Settings

ROOT = Path(__file__).parents[2]


class Const(nn.Module):
    """Reconstructs one value everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, h: Tensor) -> Tensor:
        return torch.full_like(h, self.value)


def rows(count: int, empty: int | None = None) -> Rows:
    """Images with the channels over frequency that are exactly theirs, of another scale."""
    h = torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(count))
    if empty is not None:
        h[empty] = 0.5
    return Rows(h, 3j * metrics.to_frequency(h), "", "some rows")


def evaluated(models: list[nn.Module], test: Rows) -> Evaluated:
    run = trained.Trained(Path("run"), Settings(), Settings(), Path("run/weights"), 500, "finished")
    return Evaluated(run, samples.measure(models, test, "fp32", CPU))


def test_a_perfect_model_and_one_that_has_learnt_nothing() -> None:
    test = rows(5)
    found = evaluated([nn.Identity(), Const(0.5)], test)
    perfect, nothing = found.per_ue()
    assert (perfect["loss"], perfect["nmse_db"]) == (0.0, None)  # JSON has no infinity
    assert perfect["rho"] == pytest.approx(1, abs=1e-6)
    assert perfect["sgcs"] == pytest.approx(1, abs=1e-6)
    assert nothing["nmse_db"] == pytest.approx(0, abs=1e-6)
    assert nothing["loss"] == pytest.approx(nothing["floor_loss"])
    assert (nothing["rho"], nothing["sgcs"]) == (0.0, 0.0)  # it points nowhere
    assert samples.ceiling(test) == pytest.approx((1, 1), abs=1e-6)
    other = Rows(test.h_BAD, metrics.to_frequency(test.h_BAD, 20, 32), "", "", padded=32)
    assert samples.ceiling(other) == pytest.approx((1, 1), abs=1e-6)


def test_the_images_themselves_are_shown_where_they_have_rho_and_sgcs() -> None:
    test = rows(5)
    [line] = [
        line
        for line in table.of_run(evaluated([Const(0.6)], test), samples.ceiling(test)).splitlines()
        if line.split()[:1] == ["H"]
    ]
    assert line.endswith("1.0000      1.0000   the images themselves: best possible ρ and SGCS")
    without = Rows(test.h_BAD, None, "no file", "")
    shown = table.of_run(evaluated([Const(0.6)], without), samples.ceiling(without))
    assert "themselves" not in shown
    assert "a constant 0.5: the floor" in shown


def test_means_are_over_rows_then_ues_and_linear_before_db() -> None:
    h = torch.full((2, 2, 1, 1), 0.5)
    h[0, 0] = (
        1.0  # errors of a constant 0.75: .0625 + .0625, energy .25; then .0625 + .0625 and .01
    )
    h[1, 1] = 0.6
    test = Rows(h, None, "none", "")
    found = evaluated([Const(0.75), Const(0.5)], test)
    nmse = [(0.125 / 0.25 + (0.0625 + 0.0225) / 0.01) / 2, 1.0]
    for row, value in zip(found.per_ue(), nmse, strict=True):
        assert row["nmse_db"] == pytest.approx(10 * math.log10(value), rel=1e-5)
        assert (row["rho"], row["sgcs"]) == (None, None)
    assert found.mean()["nmse_db"] == pytest.approx(10 * math.log10(sum(nmse) / 2), rel=1e-5)
    losses = [(0.125 / 1.25 + 0.085 / 0.61) / 2, (0.25 / 1.25 + 0.01 / 0.61) / 2]
    assert found.mean()["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert samples.ceiling(test) is None


def test_percentiles_are_numpys() -> None:
    found = evaluated([Const(0.6), Const(0.4)], rows(37))
    assert {"nmse_db", "rho", "sgcs"} <= found.distribution().keys()
    linear = found.samples[..., samples.COLUMNS.index("nmse")].flatten()
    torch.testing.assert_close(found.pooled("nmse_db"), 10 * linear.log10())
    for name, percentiles in found.distribution().items():
        pool = found.pooled(name).numpy()
        assert len(pool) == 74
        wanted = np.percentile(pool, [5, 25, 50, 75, 95])
        assert list(percentiles.values()) == pytest.approx(wanted.tolist(), rel=1e-12)


def test_rows_without_energy_are_left_out_and_counted() -> None:
    with_empty = evaluated([Const(0.6)], rows(6, empty=2))
    assert with_empty.empty == 1
    full = rows(6, empty=2)
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert full.hf_BAK is not None
    without = evaluated([Const(0.6)], Rows(full.h_BAD[keep], full.hf_BAK[keep], "", ""))
    for name in ("nmse_db", "rho", "sgcs"):
        assert with_empty.mean()[name] == pytest.approx(without.mean()[name])
        assert len(with_empty.pooled(name)) == 5
    assert len(with_empty.pooled("loss")) == 6
    assert samples.ceiling(full) == pytest.approx((1, 1), abs=1e-6)


class FirstColumn(nn.Module):
    """Reconstructs nothing but the first column."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.where(torch.arange(h.shape[3]) == 0, h, 0.5)


def test_a_column_that_a_reconstruction_lacks_leaves_the_others() -> None:
    h = rows(5).h_BAD
    test = Rows(h, metrics.to_complex(h), "", "", similarity=True)
    [found] = evaluated([FirstColumn()], test).per_ue()
    assert found["sgcs"] == pytest.approx(1 / 4)
    assert found["sgcs"] == pytest.approx(float(metrics.column_sgcs(FirstColumn()(h), h).mean()))


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="aren't finite"):
        evaluated([Const(math.nan)], rows(3))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_find_the_same_figures_to_the_bit(ranks: int) -> None:
    test, model = rows(2 * samples.BLOCKS["cpu"] + 50), nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    alone = samples.measure([model], test, "fp32", CPU)
    shares = [samples.measure([model], test, "fp32", CPU, r, ranks) for r in range(ranks)]
    assert torch.equal(sum(shares, torch.zeros(())), alone)
    assert (alone != 0).all()
    assert all((share == 0).any() for share in shares)


# Test sets


def csinet(tmp_path: Path, count: int = 12, hf: int | None = None, **more: Any) -> Settings:
    """Files of a test set, and nothing to train on."""
    save(tmp_path / "DATA_Htestin.mat", images(count).reshape(count, -1))
    if hf is not None:
        values = np.random.default_rng(0).random((hf, 32 * 125)) + 1j
        save(tmp_path / "DATA_HtestFin_all.mat", values.astype(np.complex64), "HF_all")
    data = DataSettings(source="csinet", path=str(tmp_path), **more)
    return Settings(data=data)


def test_a_test_set_needs_no_training_rows(tmp_path: Path) -> None:
    test = testset.load(csinet(tmp_path, 12))
    np.testing.assert_array_equal(test.h_BAD, images(12))
    assert (test.hf_BAK, test.missing) == (None, NO_FILE)


def test_hf_all_is_of_the_same_rows(tmp_path: Path) -> None:
    settings = csinet(tmp_path, 12, hf=12, test_samples=5)
    test = testset.load(settings)
    assert test.hf_BAK is not None
    assert test.hf_BAK.shape == (5, 32, 125)
    smaller = Settings(data=settings.data, model=ModelSettings(angles=16))
    assert testset.load(smaller).missing == SMALLER
    with pytest.raises(ValueError, match="HF_all has 11 indoor rows, the test set 12"):
        testset.load(csinet(tmp_path, 12, hf=11))


def test_built_in_channels_have_the_frequencies_of_their_rows() -> None:
    for environment in ("indoor", "noniid"):
        data = DataSettings(environment=environment, test_samples=20)
        test = testset.load(Settings(data=data))
        best = samples.ceiling(test)
        assert best is not None
        assert 0.9 < min(best) <= max(best) < 1  # other rows' would have about 0.2


# The command


def evaluate(*arguments: object) -> None:
    parser = RunParser("evaluate", "")
    command.add_arguments(parser)
    options, settings = parser.parse([str(argument) for argument in arguments])
    assert isinstance(options, Namespace)
    command.run(options, settings, None)


def test_a_mistyped_option_is_no_setting() -> None:
    for word, near in (("--bit", "--bits"), ("--weigths=best", "--weights")):
        with pytest.raises(ValueError, match=rf"no option {word.split('=')[0]} .* mean {near}\?\)"):
            evaluate("run", word)
    parser = RunParser("evaluate", "")
    command.add_arguments(parser)
    setting = ["--train.init", "weights"]  # a value that is called like an option
    assert parser.parse(["run", *setting])[1] == setting


def test_a_run_leaves_tables_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = trainedruns.finish(tmp_path / "run")
    evaluate(tmp_path / "run")
    printed = capsys.readouterr().out
    out = tmp_path / "run" / "evaluation"
    content = json.loads((out / "figures.json").read_text())
    [run] = content["runs"]
    wanted = worker.evaluate("test").summary()
    for mine, theirs in zip(
        [run["mean"], *run["per_ue"]], [wanted, *wanted["per_ue"]], strict=True
    ):
        for name in ("loss", "nmse_db"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
            assert (
                f"{theirs[name]:.{3 if name == 'loss' else 2}{'e' if name == 'loss' else 'f'}}"
                in printed
            )
        assert 0 < mine["sgcs"] < mine["rho"] < content["test"]["ceiling"]["rho"]
    assert "iteration 10 of 10, run finished" in printed
    assert content["test"]["rows"] == {"indoor": 20}
    assert (out / "table.txt").read_text().strip() in printed
    assert (out / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*.partial"))


def test_pca_of_a_runs_own_rows_is_no_ceiling_on_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainedruns.finish(tmp_path / "run", data={"train_samples": 400})
    for changes, bound in (
        ([], True),
        (["--data.test_samples", "9"], True),
        (["--data.environment", "outdoor"], False),
    ):
        evaluate(tmp_path / "run", *changes)
        printed = capsys.readouterr().out
        assert ("of this model's ceiling" in printed) == bound
        assert ("of the run's own 400 training rows\n" in printed) == (not bound)
        content = json.loads((tmp_path / "run/evaluation/figures.json").read_text())
        assert content["runs"][0]["ceiling"]["bound"] == bound


def test_a_title_fits_whatever_the_path(tmp_path: Path) -> None:
    path = "/home/somebody/channels/MEASURED_IN_APRIL/cost2100/indoor"
    for panels in (1, 3):
        figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
        figure.subplots(1, panels)
        plotting.entitle(figure, f"indoor ({path}), 1,500 rows of 32 × 32")
        figure.draw_without_rendering()
        [title] = figure.texts
        box = title.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height
        assert path in title.get_text().replace("\n", "")


def test_runs_are_compared_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainedruns.finish(tmp_path / "one")
    trainedruns.snapshot(tmp_path / "two", trainedruns.begin(tmp_path / "two", "fedavgper"), 7)
    few = {"train_samples": 32, "holdout": 0.0}
    trainedruns.finish(tmp_path / "three", "centralised", model={"c1": 16}, data=few)
    evaluate(tmp_path / "one", "--compare", tmp_path / "two", tmp_path / "three")
    lines = capsys.readouterr().out.splitlines()
    [head] = [i for i, line in enumerate(lines) if line.startswith("run ")]
    cells = [line.split() for line in lines[head + 1 : head + 4]]
    assert [line.endswith("  too few rows") for line in lines[head + 1 : head + 4]] == [0, 0, 1]
    assert sum("32 training rows are too few: it takes more than" in line for line in lines) == 1
    assert [line[:6] for line in cells] == [
        ["one", "CSILocal", "24", "16", "4", "10"],
        ["two", "FedAvgPer", "24", "16", "4", "7"],
        ["three", "centralised", "16", "16", "4", "10"],
    ]
    content = json.loads((tmp_path / "one/comparison/figures.json").read_text())
    assert [f"{run['mean']['loss']:.3e}" for run in content["runs"]] == [c[6] for c in cells]
    assert (tmp_path / "one/comparison/samples.png").is_file()


def test_different_models_are_named_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainedruns.finish(tmp_path / "one")
    trainedruns.finish(tmp_path / "two", model={"name": "linear"})
    evaluate(tmp_path / "one", "--compare", tmp_path / "two")
    lines = capsys.readouterr().out.splitlines()
    [head] = [i for i, line in enumerate(lines) if line.startswith("run ")]
    assert lines[head].split()[:4] == ["run", "method", "model", "c1"]
    assert [line.split()[:4] for line in lines[head + 1 : head + 3]] == [
        ["one", "CSILocal", "csilocal", "24"],
        ["two", "CSILocal", "linear", "24"],
    ]
    content = json.loads((tmp_path / "one/comparison/figures.json").read_text())
    assert [run["model"] for run in content["runs"]] == ["csilocal", "linear"]


def test_only_figures_of_one_test_set_are_compared(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "one")
    ours = "rows of data.source synthetic, data.seed"
    others: list[tuple[str, dict[str, Any], str]] = [
        (
            "seed",
            {"data": {"seed": 1}},
            f"{ours} 0, data.kind channel and {ours} 1, data.kind channel",
        ),
        ("rows", {"data": {"test_samples": 19}}, "20 indoor rows and 19 indoor rows"),
        (
            "mixture",
            {"data": {"environment": "noniid"}},
            "20 indoor rows and 10 indoor and 10 outdoor rows",
        ),
        ("size", {"model": {"delays": 4}}, "8 delays and 4 delays"),
    ]
    for name, sections, difference in others:
        trainedruns.finish(tmp_path / name, **sections)
        with pytest.raises(ValueError, match=rf"different test sets: {difference}\. Give"):
            evaluate(tmp_path / "one", "--compare", tmp_path / name)
    evaluate(tmp_path / "one", "--compare", tmp_path / "seed", "--data.seed", "2")


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    for arguments, message in (
        (["--data.seed", "1", tmp_path / "run"], "RUN comes first"),
        ([tmp_path / "none"], "is not a run's directory"),
        ([tmp_path / "run", "--compare", *[tmp_path / "run"] * 8], "at most 8"),
        ([tmp_path / "run", "--compare"], "expected at least one argument"),
        ([tmp_path / "run", "--data.test_samples", "0"], "test_samples is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(*arguments)
    assert not (tmp_path / "run" / "evaluation").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't be written"):
        evaluate(tmp_path / "run", "--out", tmp_path / "file")


def test_it_runs_without_deepspeed(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    code = (
        "import runpy, sys; sys.modules['deepspeed'] = None; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "launch/evaluate.py"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "RANK"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "percentile" in ended.stdout
