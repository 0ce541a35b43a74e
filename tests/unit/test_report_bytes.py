"""The report on bytes, from runs made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import reportruns
from reportruns import FLOOR, finish

from csipipe.reports import bytes as report
from csipipe.reports.command import Report
from csipipe.reports.plan import LINKS
from csipipe.reports.reproduce import REPORTS

ENDS = [0.8, 0.6, 0.5, 0.5, 0.5]
"""Losses of evaluations; the given loss is 0.9 of the way from 1 to 0.5: 0.55."""


def found(out: Path, sizes: dict[tuple[str, str], int], end: float = 0.5) -> report.Curves:
    """Curves of runs that exchange so many scalars, of 4 bytes each, between two evaluations.

    Args:
        end: the loss that codecs other than fp32 end with.
    """
    asked = report.wanted(Report(reportruns.preset(), out, quick=False, collect=True, jobs=1))
    for (method, coding, _), run in asked.items():
        if (method, coding) in sizes:
            last = 0.5 if coding == "fp32" else end
            finish(run, [*ENDS[:2], *[last] * 3], scalars=sizes[method, coding])
    return {key: run.curve() for key, run in asked.items() if run.folder.exists()}


SIZES = {
    ("csilocal", "fp32"): 400,
    ("csilocal", "int8, scale ue"): 100,
    ("csilocal", "int4, scale ue"): 50,
}
RIVALS = {("fedavg", "fp32"): 1000, ("fedavg", "int8"): 250, ("fedavg", "int4, feedback"): 200}


def test_bytes_until_the_given_loss_by_hand(tmp_path: Path) -> None:
    curves = found(tmp_path, SIZES | RIVALS)
    assert report.loss_of(curves) == pytest.approx(FLOOR - 0.9 * 0.5)
    tried = {(one.method, one.coding): one for one in report.judge(curves)}
    # half of the third interval is 2.5 of them
    assert tried["csilocal", "int8, scale ue"].until == pytest.approx(
        dict.fromkeys(range(3), 2.5 * 400)
    )
    one = report.Tried("csilocal", "fp32", {0: 2.5e6, 2: 2.5e6}, 3, 0.5, 1.0)
    assert report._row(one, [one])[2] == "2.50 (2 of 3 seeds)"
    alone = report.Tried("csilocal", "fp32", {0: 2.5e6}, 1, 0.5, 1.0)
    assert report._row(alone, [alone])[2] == "2.50 (1 of 1 seed)"
    assert report.seconds(2.5e6, 10) == 2.0
    assert report._seconds(2.5) == report.seconds(2.5e6, LINKS[0])  # the picture's other axis
    assert report._megabytes(report._seconds(2.5)) == 2.5
    goals = [claim.holds for claim in report.claims([*tried.values()])]
    # int8: 0.25 of its own, 0.1 of FedAvg's, 0.5 of FedAvg's best; int4: half of each
    assert goals == [True, True, True, True, True, True]
    best = report.best([*tried.values()], "fedavg")
    assert best is not None
    assert best.coding == "int4, feedback"
    assert "0.100 times" in report.verdict(curves, [*tried.values()], 3, "")


def test_a_worse_end_does_not_count(tmp_path: Path) -> None:
    curves = found(tmp_path, SIZES | RIVALS, end=0.53)  # 6 % above fp32's
    tried = report.judge(curves)
    assert [one.coding for one in tried if one.counts] == ["fp32", "fp32"]
    assert not any(claim.holds for claim in report.claims(tried))


def test_a_codec_with_which_a_seed_never_gets_there_does_not_count(tmp_path: Path) -> None:
    curves = {**found(tmp_path, SIZES | RIVALS)}
    key = ("csilocal", "int8, scale ue", 1)
    curves[key] = replace(curves[key], loss=[0.8, 0.7, 0.6, 0.6, 0.6])
    tried = {(one.method, one.coding): one for one in report.judge(curves)}
    assert tried[key[:2]].over_fp32 == 1  # the median
    assert not tried[key[:2]].counts
    assert tried["csilocal", "int4, scale ue"].counts
    assert [claim.holds for claim in report.claims([*tried.values()])] == [False] * 3 + [True] * 3


def test_nothing_is_judged_without_the_runs_in_fp32(tmp_path: Path) -> None:
    curves = found(tmp_path, SIZES)
    assert report.loss_of(curves) is None
    assert {claim.holds for claim in report.claims(report.judge(curves))} == {None}
    page = report.verdict(curves, [], 3, "3 run(s) are not in this report")
    assert "can't be judged" in page
    assert "There is no given loss" in page


def test_nothing_is_judged_where_a_method_learnt_nothing(tmp_path: Path) -> None:
    curves = {**found(tmp_path, SIZES | RIVALS)}
    curves["fedavg", "fp32", 1] = replace(curves["fedavg", "fp32", 1], loss=[2 * FLOOR] * 5)
    assert report.loss_of(curves) is None
    assert report.judge(curves) == []
    assert "fallen below the floor (1.000e+00, a constant" in report.verdict(curves, [], 3, "")


def test_runs_in_fp32_are_those_of_the_headline(tmp_path: Path) -> None:
    from csipipe.reports import headline

    one = Report(reportruns.preset(), tmp_path, quick=False, collect=True, jobs=1)
    mine = {run.name: run.settings for run in report.wanted(one).values()}
    shared = [run for run in headline.wanted(one).values() if run.name in mine]
    assert len(shared) == 6
    assert all(mine[run.name] == run.settings for run in shared)
    assert len(mine) == 27
    assert REPORTS["bytes"] is report
