"""The report on CSILocal's gap to centralised training, from runs made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reportruns
from reportruns import finish

from csipipe.reports import gap as report
from csipipe.reports.command import Report
from csipipe.reports.reproduce import ARRAYS, REPORTS


def made(folder: Path) -> Report:
    return Report(reportruns.preset(), folder, quick=False, collect=True, jobs=1)


def test_the_same_rows_and_samples_whoever_has_them(tmp_path: Path) -> None:
    asked = report.wanted(made(tmp_path))
    assert len({run.folder for run in asked.values()}) == len(asked) == 2 * (1 + 5) * 3
    for (method, rows, ues, seed), run in asked.items():
        settings = run.settings
        assert (settings.method, settings.topology.ues) == (method, ues)
        assert settings.data.train_samples == rows
        assert settings.train.seed == seed
        assert settings.train.batch_size * ues == 416  # of 424, what 16 UEs can share
        assert settings.run.eval_ues == (4 if ues > 4 else None)
    assert {rows for _, rows, _, _ in asked} == {8000, 2000}
    assert "gap" in REPORTS
    assert ARRAYS["gap"] is report.wanted


def test_the_gap_by_hand(tmp_path: Path) -> None:
    one = made(tmp_path)
    for (method, rows, ues, seed), run in report.wanted(one).items():
        if rows == 2000 and seed < 2:
            unsplit = 0.4 + 0.1 * seed
            gap = 1 + ues * (0.025 + 0.05 * seed)
            end = unsplit if method == "centralised" else unsplit * gap
            finish(run, [0.8, *[end] * 3])
    asked = report.wanted(one)
    curves = {key: run.curve() for key, run in asked.items() if run.folder.exists()}
    found = report.gaps(curves)
    assert found[2000, 8] == pytest.approx([1.2, 1.6])
    page = report.verdict(one, curves, "")
    assert "; medians over 3 seeds, and" in page
    single = replace(one, preset=replace(one.preset, seeds=(0,)))
    assert "; medians over 1 seed, and" in report.verdict(single, curves, "")
    assert "| 2,000 | 8 | 250 | 6.400e-01 | 1.400 (1.200 … 1.600) |" in page
    (line,) = report.draw(curves).axes[0].get_lines()[:1]
    points = np.asarray(line.get_xydata())
    wanted = [(1.0, 1.05), (2.0, 1.1), (4.0, 1.2), (8.0, 1.4), (16.0, 1.8)]
    np.testing.assert_allclose(points, np.array(wanted))


def test_samples_that_cannot_be_shared_are_named(tmp_path: Path) -> None:
    preset = replace(reportruns.preset(), arguments=("--train.batch_size", "4"))
    one = replace(made(tmp_path), preset=preset)
    with pytest.raises(ValueError, match=r"train\.batch_size 4 samples can't be shared by 16"):
        report.wanted(one)
