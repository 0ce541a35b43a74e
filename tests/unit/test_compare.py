"""Models side by side: what is shown of them, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import trainedruns
from torch import nn

from csipipe import channels, models
from csipipe.channels import statistics
from csipipe.channels.source import Span
from csipipe.comm.world import World
from csipipe.compare import command, figures, page, plan
from csipipe.compare.figures import Figures
from csipipe.evaluation import samples, testset
from csipipe.export.parts import operations
from csipipe.models.ceiling import confined
from csipipe.reports import budget
from csipipe.reports.runs import placed
from csipipe.run import ceiling, trained
from csipipe.run.training import launch
from csipipe.settings import commandline
from csipipe.settings.config import DataSettings, ModelSettings, Settings, TopologySettings
from csipipe.tracking import ceiling_note, tables

SMALL = ModelSettings(c1=12, angles=6, delays=4)


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (SMALL, 12),
        (replace(SMALL, c2=5), 5),
        (replace(SMALL, c2=5, head="crblock"), None),
        (replace(SMALL, name="crnet"), None),
        (replace(SMALL, name="crnet", c2=5), 5),
        (replace(SMALL, name="csinet", c2=5), None),  # a convolution follows
        (replace(SMALL, name="transnet", c2=5), 5),
        (replace(SMALL, name="linear"), 12),
        (replace(SMALL, name="linear", c2=5), 5),
    ],
)
def test_a_ceiling_is_the_narrowest_of_the_last_linear_layers(
    model: ModelSettings, wanted: int | None
) -> None:
    assert models.ceiling(model) == wanted


def test_a_wide_layer_is_no_ceiling() -> None:
    assert confined([nn.Linear(4, 8), nn.ReLU(), nn.Linear(9, 8)]) is None
    assert confined([nn.Linear(10, 100), nn.Linear(100, 8)]) is None
    assert confined([nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh()]) == 8


def some(model: str, c1: int, seed: int = 0, **values: float) -> Figures:
    known = {"nmse_db": -3.0, "rho": 0.9, "sgcs": 0.8, "seconds": 60.0} | values
    return Figures(
        model=model,
        c1=c1,
        seed=seed,
        iterations=10,
        parameters=1000,
        macs_at_ue=500,
        feedback_bits=32 * c1,
        ceiling=None,
        **known,
    )


def test_the_page_has_a_line_per_run_and_pca_and_the_floor(tmp_path: Path) -> None:
    found = [some("crnet", 64), some("linear", 64, rho=math.nan, sgcs=math.nan)]
    text = page.text(found, {64: -2.5}, "tried")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        lines[2] == "| crnet | 64 | -3.00 | 0.9000 | 0.8000 | 1,000 | 500 | 2,048 | 60 | 10 | — |"
    )
    assert "| linear | 64 | -3.00 | — | — |" in lines[3]
    assert lines[4].startswith("| PCA-64 | 64 | -2.50 |")
    assert lines[5].startswith("| floor: a constant 0.5 | 0 | 0.00 |")
    axes = page.draw(found, {64: -2.5}).axes
    assert len(axes) == 12
    assert len(page.draw([found[1]], {}).axes) == 4  # without ρ and SGCS
    assert "PCA-64" in [t.get_text() for t in axes[0].texts]
    page.write_csv(tmp_path / "table.csv", found)
    assert (tmp_path / "table.csv").read_text().splitlines()[1].startswith("crnet,64,0,10,-3.0")


def test_runs_that_had_less_or_more_than_their_minutes_are_named() -> None:
    found = [some("crnet", 64, seconds=40.0), some("linear", 64, seconds=50.0)]
    assert "1 minutes: much less crnet with c1 = 64 (40 s)." in page.text(found, {}, "tried", 1.0)
    assert "0.6 minutes: much more linear with c1 = 64 (50 s)." in page.text(found, {}, "", 0.6)
    assert "Not compared" not in page.text(found, {}, "tried", 0.7)
    assert "Not compared" not in page.text(found, {}, "tried")


def test_several_seeds_are_shown_by_median_and_spread() -> None:
    found = [some("crnet", 64, seed, nmse_db=db) for seed, db in enumerate((-3.0, -5.0, -3.5))]
    text = page.text([*found, some("linear", 64)], {}, "tried")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[2].startswith("| crnet | 64 | -3.50 (-5.00 … -3.00) | 0.9000 (0.9000 … 0.9000) |")
    assert lines[3].startswith("| linear | 64 | -3.00 |")
    [mark, *_] = page.draw(found, {}).axes[0].containers
    assert [part.get_segments()[0][:, 1].tolist() for part in mark[2]] == [[-5.0, -3.0]]
    assert mark[0].get_ydata().tolist() == [-3.5]


@pytest.mark.parametrize(
    "values", [(1054006, 2102838), (3e3, 4e7), (34.70e6, 35.72e6), (64.0, 64.0), (128, 16384)]
)
def test_labels_of_a_cost_do_not_touch(values: tuple[float, float]) -> None:
    found = [replace(some("crnet", n), parameters=int(v)) for n, v in enumerate(values, 8)]
    figure = page.draw([replace(f, macs_at_ue=f.parameters) for f in found], {})
    figure.draw_without_rendering()
    for axes in figure.axes[-4:]:
        boxes = [t.get_window_extent() for t in axes.get_xticklabels(which="both") if t.get_text()]
        inside = [b for b in boxes if axes.bbox.x0 - 1 <= (b.x0 + b.x1) / 2 <= axes.bbox.x1 + 1]
        assert len(inside) >= 1
        for one, other in itertools.pairwise(sorted(inside, key=lambda box: box.x0)):
            assert one.x1 + 2 < other.x0, axes.get_xlabel()


def test_pca_of_all_training_rows_is_no_worse_with_more_components() -> None:
    settings = Settings(
        model=SMALL,
        topology=TopologySettings(ues=2),
        data=DataSettings(train_samples=60, test_samples=10),
    )
    found = ceiling.pca(settings, testset.load(settings).h_BAD.numpy(), [2, 8, 40])
    assert list(found) == [2, 8]  # 40 would be fitted to single rows
    assert found[8] < found[2] < 0


def test_the_ceiling_is_fitted_to_the_nmse_of_all_training_rows() -> None:
    settings = Settings(
        model=replace(SMALL, c1=12, c2=8),
        topology=TopologySettings(ues=2),
        data=DataSettings(train_samples=60, test_samples=10),
    )
    found = ceiling.find(settings)
    assert found is not None
    assert (found.components, found.bound, found.rows) == (8, True, 60)
    # not of so few: that of more rows is below it
    assert ceiling_note(asdict(found)) == "of 60 training rows: an estimate of this model's ceiling"
    more = replace(settings, data=replace(settings.data, train_samples=600))
    assert found.nmse_db is not None
    assert ceiling.pca(more, testset.load(settings).h_BAD.numpy(), [8])[8] < found.nmse_db
    beyond = ceiling.find(replace(settings, model=replace(settings.model, head="crblock")))
    assert beyond is not None
    assert (beyond.components, beyond.bound) == (12, False)
    assert ceiling_note(asdict(beyond)) == "of 60 training rows: no bound, this model can beat it"
    assert beyond.nmse_db is not None
    assert beyond.nmse_db < found.nmse_db
    # where it was fitted, its NMSE is below that of a fit to the squared error
    source = channels.open_source(settings.data, 6, 4)
    rows = source.rows("indoor", "train", 0, 60)
    fitted = statistics.pca_db(rows, rows, [8])[8]
    assert statistics.pca_db(rows, rows, [8], weighted=True)[8] < fitted - 0.01
    few = replace(settings, data=replace(settings.data, train_samples=16))
    found = ceiling.find(few)
    assert found == ceiling.Ceiling(components=8, bound=True, rows=16, nmse_db=None)
    [*_, line] = tables.test_table(
        {"loss": 1e-3, "nmse_db": -1.0, "floor_loss": 2e-3, "per_ue": []}, asdict(found)
    ).splitlines()
    assert line.split(maxsplit=3) == [
        *("PCA-8", "—", "—"),
        "16 training rows are too few: it takes more than 2 per component",
    ]
    whole = replace(settings, model=replace(settings.model, c1=48, head="crblock"))
    assert ceiling.find(whole) is None  # PCA would lose nothing


def test_only_what_a_ceiling_is_fitted_to_is_read() -> None:
    spans = [Span("indoor", "train", 0, 60), Span("outdoor", "train", 10, 40)]
    few = ceiling.fitted(spans, 30)
    assert few == [Span("indoor", "train", 0, 20), Span("outdoor", "train", 10, 20)]
    assert ceiling.fitted(spans, 90) == spans
    uneven = ceiling.fitted([Span("indoor", "train", n, n + 7) for n in (0, 7, 14)], 20)
    assert sum(span.size for span in uneven) == 20


def test_runs_differ_in_model_and_codeword_alone(tmp_path: Path) -> None:
    wanted = plan.runs(Settings(model=SMALL), ["crnet", "linear"], [8, 4], tmp_path)
    assert [run.name for run in wanted] == ["crnet-c8", "crnet-c4", "linear-c8", "linear-c4"]
    assert [(run.settings.model.name, run.settings.model.c1) for run in wanted][1] == ("crnet", 4)
    assert wanted[0].folder == tmp_path / "runs" / "crnet-c8"
    twice = plan.runs(Settings(model=SMALL), ["crnet", "linear", "crnet"], [8, 4, 8], tmp_path)
    assert twice == wanted
    with pytest.raises(ValueError, match=r"model\.split is \[1, 9\]"):  # of linear alone
        plan.runs(
            Settings(model=replace(SMALL, split=(1, 9))), ["csilocal", "linear"], [8], tmp_path
        )
    seeds = plan.runs(Settings(model=SMALL), ["linear"], [8], tmp_path, 2)
    assert [(run.name, run.settings.train.seed) for run in seeds] == [
        ("linear-c8", 0),
        ("linear-c8-seed1", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--c", "12,none"], "--c is '12,none'; expected positive numbers"),
        (["--models", "crnet,magic"], "model.name is 'magic'; it must be one of csilocal"),
        (["--minutes", "0"], "--minutes is 0.0; it must be a positive number"),
        (["--run.dir", "x"], "run.dir is 'x', but there are several runs; use --out"),
        (["--collect"], "has no finished run of this comparison; leave --collect out"),
    ],
)
def test_what_cannot_be_compared_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model.angles", "6", "--model.delays", "4", "--c", "8", "--out", str(tmp_path)]
    assert command.main([*small, "--data.test_samples", "8", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_figures_are_of_the_whole_model_and_the_whole_training(tmp_path: Path) -> None:
    """Of a run cut before the encoder's linear layer, where something else than c1 crosses."""
    folder = tmp_path / "runs" / "run"
    split = {"split": (4, 6), "kernels_by": "torch"}
    worker = trainedruns.finish(folder, "centralised", model=split)
    settings, ue = worker.settings, worker.ues[0]
    summary = json.loads((folder / "summary.json").read_text()) | {"seconds_per_iteration": 0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert models.widths(settings.model)[0] != settings.model.c1
    rows = testset.load(settings)
    found = figures.measure(placed("run", settings, tmp_path), rows)
    assert (found.c1, found.iterations) == (settings.model.c1, 10)
    assert found.seconds == pytest.approx(5)
    parts = nn.ModuleList([ue.encoder, worker.tail, ue.head])
    assert found.parameters == sum(p.numel() for p in parts.parameters())
    parts.eval()
    with torch.no_grad():
        y = worker.tail(ue.encoder(rows.h_BAD))
        h_hat = ue.head(y)
    convolution = 2 * 2 * 9 * 8 * 8  # all that the encoder multiplies
    assert found.macs_at_ue == convolution + operations(ue.head, y)
    values = samples.means(trained.read(folder), rows)
    assert (found.rho, found.sgcs) == (values["rho"], values["sgcs"])
    assert found.rho != found.sgcs
    error = (h_hat - rows.h_BAD).square().sum((1, 2, 3))
    nmse = (error / (rows.h_BAD - 0.5).square().sum((1, 2, 3))).mean()
    assert found.nmse_db == pytest.approx(10 * math.log10(nmse), abs=1e-4)


def test_what_is_collected_is_what_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--model.angles 6 --model.delays 4 --topology.ues 1 --method centralised"
    few = "--data.train_samples 60 --data.test_samples 8 --train.batch_size 8"
    words = f"{small} {few} --train.micro_batches 1".split()
    few_iterations = [*words, "--train.iterations", "3"]
    settings = commandline.read(few_iterations)
    [run] = plan.runs(channels.sized(settings), ["linear"], [8], tmp_path)
    launch(World.alone(), run.settings)
    given = ["--models", "linear", "--c", "8,2", "--out", str(tmp_path), "--collect"]
    assert command.main([*given, *few_iterations]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "3 iterations each" in table
    assert "Not finished, and not in here: linear-c2." in table
    assert table.count("| linear |") == table.count("| linear | 8 |") == 1
    capsys.readouterr()
    assert command.main([*given, *few_iterations, "--train.iterations", "9"]) == 1
    said = capsys.readouterr().err
    assert "linear-c8 was made with train.iterations 3, this report needs 9" in said
    assert "--collect shows what the same command made" in said


@pytest.mark.long
def test_two_models_are_trained_and_shown(tmp_path: Path) -> None:
    arguments = (
        "--models linear,csilocal --c 8 --seeds 2 --minutes 0.02 --processes 2 --topology.stages 1"
    )
    small = "--model.angles 6 --model.delays 4 --topology.stages 1 --topology.ues 2"
    data = "--data.train_samples 60 --data.test_samples 8 --model.kernels_by torch"
    every = [*f"{arguments} {small} {data}".split(), "--out", str(tmp_path)]
    assert command.main(every) == 0
    table = (tmp_path / "table.md").read_text()
    assert "| linear | 8 |" in table
    assert "PCA-8" in table
    made = json.loads((tmp_path / "runs" / "linear-c8" / "summary.json").read_text())
    assert made["iterations"] != budget.PROBED
    other = json.loads((tmp_path / "runs" / "linear-c8-seed1" / "summary.json").read_text())
    assert other["iterations"] == made["iterations"]
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert command.main([*every, "--collect"]) == 0  # and again, from what there is
