"""The report on splitfed, from runs made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import reportruns
from reportruns import FLOOR, finish

from csipipe.reports import averaging as report
from csipipe.reports.command import Report
from csipipe.reports.reproduce import ARRAYS, REPORTS

LOSSES = [0.8, 0.6, 0.5, 0.5, 0.5]
SIZES = {
    "CSILocal (never)": 100_000,
    "SplitFed, E = 1": 800_000,
    "FedAvg": 1_000_000,
    "centralised": 0,
}


def test_bytes_until_the_given_loss_by_hand(tmp_path: Path) -> None:
    one = Report(reportruns.preset(), tmp_path, quick=False, collect=True, jobs=1)
    asked = report.wanted(one)
    assert len(asked) == 7 * 3
    assert len({run.folder for run in asked.values()}) == len(asked)
    train = {case: run.settings.train for (case, seed), run in asked.items() if seed == 0}
    assert train["SplitFed, E = 100"].aggregate_every == 100
    assert train["SplitFed, E = 10, then 30 on their own"].personal_iterations == 30
    for (case, _), run in asked.items():
        if case in SIZES:
            last = 0.4 if case == "centralised" else 0.5
            finish(run, [*LOSSES[:2], *[last] * 3], scalars=SIZES[case])
    curves = {key: run.curve() for key, run in asked.items() if run.folder.exists()}
    assert report.loss_of(curves, 300) == pytest.approx(FLOOR - 0.9 * 0.5)
    page = report.verdict(one, curves, "")
    # half of the third interval is 2.5 of them, of 4 bytes each
    assert "| SplitFed, E = 1 | 16.0 | 8.0 (3 of 3) | 5.000e-01 | 1.250 |" in page
    lines = report.draw(curves, 300).axes[0].get_lines()
    assert {str(line.get_label()) for line in lines} == {*SIZES} - {"centralised"}
    few = {key: curve for key, curve in curves.items() if key[0] != "FedAvg"}
    assert report.loss_of(few, 300) is None
    page = report.verdict(one, few, "")
    assert "There is no given loss, so nothing is compared by it: CSILocal and FedAvg must" in page
    assert "| SplitFed, E = 1 | 16.0 | — | 5.000e-01 | 1.250 |" in page
    above = replace(curves["FedAvg", 2], loss=[FLOOR, *[2 * FLOOR] * 4])
    flat = {**curves, ("FedAvg", 2): above}
    assert report.loss_of(flat, 300) is None
    page = report.verdict(one, flat, "")
    assert "fallen below the floor (1.000e+00, a constant 0.5) in every seed. 300 iter" in page
    assert "given loss is" not in page
    assert "averaging" in REPORTS
    assert ARRAYS["averaging"] is report.wanted
