"""The search for learning rates: on held-out rows, by the median seed, and never half done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import reportruns
import yaml
from reportruns import FLOOR, finish, options

from csipipe.reports import preset as presets
from csipipe.reports import runs, search
from csipipe.reports.command import Found, Report
from csipipe.reports.curves import Curve
from csipipe.reports.preset import METHODS, PRESETS, REFERENCE


def searching(out: Path, rates: Path, losses: Mapping[str, tuple[float | None, ...]]) -> int:
    """A search over runs with these held-out losses by method and rate; None: no run."""
    preset = yaml.safe_load((PRESETS / "laptop.yaml").read_text())
    grid = [1e-3, 2e-3, 4e-3]
    preset |= {"rates": str(rates)}
    preset["search"] |= {"grid": grid, "seeds": [0], "iterations": 120, "holdout": 0.1}
    file = out / "small.yaml"
    out.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(preset))
    wanted = presets.load(str(file), user=["--train.iterations", "120", "--data.holdout", "0.1"])
    assert wanted.search is not None
    asked = search.wanted(Report(wanted, out, False, True, 1), wanted.search)
    for (method, rate, _), run in asked.items():
        value = losses.get(method, (0.3, 0.2, 0.3))[grid.index(rate)]
        if value is not None:
            finish(run, [0.9, 0.8], holdout=value)
    return search.run(options(out, preset=str(file)))


def test_the_search_takes_the_best_rate_on_held_out_rows(tmp_path: Path) -> None:
    rates = tmp_path / "rates.yaml"
    assert searching(tmp_path / "out", rates, {"fedavg": (0.1, 0.2, 0.3)}) == 0
    found = yaml.safe_load(rates.read_text())
    assert found == dict.fromkeys([*METHODS, REFERENCE], 2e-3) | {"fedavg": 1e-3}
    page = (tmp_path / "out" / "search.md").read_text()
    assert "| FedAvg | **1.000e-01** | 2.000e-01 | 3.000e-01 |" in page
    assert "At the edge of the grid: FedAvg." in page
    preset = presets.load(str(tmp_path / "out" / "small.yaml"))
    assert preset.settings("fedavg", "outdoor", 4, 0).train.lr == 1e-3


def test_a_search_takes_so_many_seeds_of_the_preset(tmp_path: Path) -> None:
    assert searching(tmp_path / "out", tmp_path / "rates.yaml", {}) == 0
    file = str(tmp_path / "out" / "small.yaml")
    assert search.run(options(tmp_path / "out", preset=file, seeds=1)) == 0
    assert search.run(options(tmp_path / "out", preset=file, seeds=2)) == 1  # runs are missing
    assert "2 seed(s)" in (tmp_path / "out" / "search.md").read_text()


def test_an_unfinished_search_leaves_the_rates_alone(tmp_path: Path) -> None:
    rates = tmp_path / "rates.yaml"
    rates.write_text("fedavg: 0.5\n")
    assert searching(tmp_path / "out", rates, {"fedgrad": (0.1, None, 0.3)}) == 1
    assert rates.read_text() == "fedavg: 0.5\n"
    assert "| FedGrad | **1.000e-01** | missing |" in (tmp_path / "out" / "search.md").read_text()


def test_a_rate_is_judged_by_the_last_evaluations_and_the_median_seed() -> None:
    nothing, loss = [0] * 4, [1.0] * 4
    holdout = [None, 0.9, 0.6, 0.3]
    curve = Curve([1, 2, 3, 4], nothing, nothing, loss, [[1.0]] * 4, loss, holdout, FLOOR)
    assert search._end("run", curve) == pytest.approx(0.6)
    asked = presets.Search(panel="f", grid=(1e-3,), seeds=(0, 1, 2), iterations=4, holdout=0.1)
    losses = {("fedavg", 1e-3, seed): value for seed, value in enumerate((0.5, 0.1, 0.2))}
    assert search.medians(losses, "fedavg", asked) == {1e-3: 0.2}


def test_a_rate_that_diverged_loses(tmp_path: Path) -> None:
    run = runs.make(reportruns.preset(), tmp_path, "fedavg", "outdoor", 4, 0)
    reason = "the loss of UE 0 is nan at iteration 3; a lower train.lr usually helps. (see log)"
    found = Found({}, {run.name: reason}, failed=True)
    assert search.held_out({("fedavg", 1.0, 0): run}, found) == {("fedavg", 1.0, 0): math.inf}
    assert search.held_out({("fedavg", 1.0, 0): run}, Found({}, {run.name: "killed"}, True)) == {}


def test_the_search_has_nothing_to_do_for_the_paper(tmp_path: Path) -> None:
    asked = options(tmp_path, preset="paper", settings=["--data.path", "x"])
    with pytest.raises(ValueError, match="nothing to search"):
        search.run(asked)


def test_rates_that_are_no_rates_are_named(tmp_path: Path) -> None:
    (tmp_path / "rates.yaml").write_text("fedsomething: 1")
    file = tmp_path / "mine.yaml"
    file.write_text("{processes: 3, compression: [4], seeds: [0], rates: rates.yaml}")
    with pytest.raises(ValueError, match=r"rates.yaml isn't a table of learning rates"):
        presets.load(str(file))
