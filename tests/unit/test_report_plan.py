"""The plan of what each method exchanges, by the paper's figures and by arithmetic."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest

from csipipe.methods.cost import shared_parts
from csipipe.models import widths
from csipipe.reports import plan
from csipipe.reports.preset import METHODS


@pytest.mark.parametrize(
    ("method", "iterations", "billions"),
    [("csilocal", 1200, 19.6608), ("fedavg", 560, 47.0664), ("fedprox", 455, 38.2414)],
)
def test_the_plan_counts_as_the_paper(method: str, iterations: int, billions: float) -> None:
    asked = ["--model.c1", "512", "--model.c2", "512", "--train.iterations", str(iterations)]
    rows = {row.method: row for row in plan.plan(plan.configuration("paper", asked)[0])}
    assert rows[method].scalars / 1e9 == pytest.approx(billions, abs=5e-5)  # as printed
    assert rows[method].bytes == 4 * rows[method].scalars
    assert rows[method].seconds[100] == pytest.approx(rows[method].bytes * 8 / 1e8)


def test_the_plan_says_where_csilocal_stops_being_cheaper(tmp_path: Path) -> None:
    model = ["--model.angles", "8", "--model.delays", "8", "--model.c1", "16", "--model.c2", "16"]
    for rows, cheaper in ((356, "CSILocal"), (357, "FedAvg")):
        settings, _ = plan.configuration(
            None, [*model, "--train.batch_size", str(rows), "--train.micro_batches", "1"]
        )
        row = plan.plan(settings)[1]
        assert row.break_even == 11410 / 32  # 356.6 samples
        assert row.scalars_per_iteration == 4 * 2 * 11410
        assert f"| FedAvg | 356.6 | {rows} | {cheaper} |" in plan.page(settings, [row])
        csilocal = plan.plan(settings)[0].scalars_per_iteration
        assert (csilocal < row.scalars_per_iteration) == (cheaper == "CSILocal")


def test_the_plan_counts_what_who_is_back_receives() -> None:
    """2 of 5 UEs, seed 0: in 3 iterations 4 are back, beside the 6 turns up and down."""
    given = ["--topology.ues", "5", "--topology.participants", "2", "--train.iterations", "3"]
    settings, _ = plan.configuration(None, given)
    rows = {row.method: row for row in plan.plan(settings)}
    d, _ = shared_parts(settings["fedavg"])
    assert rows["fedavg"].scalars == (6 + 6 + 4) * d
    c1, c2 = widths(settings["csilocal"].model)
    assert rows["csilocal"].scalars == 2 * 6 * 32 * (c1 + c2)
    assert rows["fedavg"].break_even == 16 * d / (12 * (c1 + c2))
    assert "\n2 of 5 UEs" in plan.page(settings, list(rows.values()))


def test_local_steps_count_where_they_are_taken() -> None:
    settings, _ = plan.configuration(
        None, ["--train.local_steps", "3", "--train.precision", "bf16"]
    )
    page = plan.page(settings, plan.plan(settings))
    cells = [line.split(" | ") for line in page.splitlines() if "|" in line]
    here = {line[0]: line[2] for line in cells}
    assert (here["| FedAvg"], here["| FedGrad"]) == ("96", "32")
    assert plan.plan(settings)[0].bytes == 2 * plan.plan(settings)[0].scalars


def test_the_plan_leaves_out_methods_that_settings_do_not_suit() -> None:
    """SplitFed exchanges encoder and head alone; the others train on."""
    frozen = ["--train.freeze", "encoder,head", "--train.stacked", "always"]
    wanted, refused = plan.configuration("laptop", frozen)
    assert list(wanted) == list(METHODS)
    assert list(refused) == ["splitfed"]
    page = plan.page(wanted, plan.plan(wanted), refused)
    assert "SplitFed is left out: train.freeze is encoder,head, which are all the parts" in page
    with pytest.raises(ValueError, match=r"run\.eval_ues is 9"):
        plan.configuration(None, ["--run.eval_ues", "9"])


def test_the_plan_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.run(Namespace(preset="paper", out=str(tmp_path), settings=[])) == 0
    line = "| CSILocal | 8,192,000 | 32,768,000 | 163,840,000,000 | 655.360 |"
    assert line in capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [row["method"] for row in rows] == [*METHODS, "splitfed"]
    ours, *others = csv.DictReader((tmp_path / "plan.csv").open())
    assert len(others) == len(METHODS)
    assert (ours["scalars"], ours["bytes"]) == ("163840000000", "655360000000")
    assert float(ours["seconds_at_1000_mbit_per_s"]) == pytest.approx(655.36 * 8)
