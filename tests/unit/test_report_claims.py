"""Figures and verdicts of the reports, from runs made by hand."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import reportruns
from reportruns import FLOOR, finish, options

from csipipe.reports import fig5, fig6, headline, runs
from csipipe.reports import preset as presets
from csipipe.reports.curves import Curve
from csipipe.reports.fig6_claims import Panels
from csipipe.reports.fig6_claims import claims as fig6_claims
from csipipe.reports.preset import METHODS, PANELS, REFERENCE
from csipipe.settings.config import Environment

ROOT = Path(__file__).parents[2]
COMPRESSION = (16, 8, 4)


def holds(claims: list[object]) -> list[bool | None]:
    return [claim.holds for claim in claims]  # type: ignore[attr-defined]


# Fig. 5


def points(out: Path, ends: Mapping[Environment, tuple[float, ...]]) -> fig5.Points:
    found: dict[tuple[str, int], Curve] = {}
    for environment, losses in ends.items():
        for ratio, loss in zip(COMPRESSION, losses, strict=True):
            run = runs.make(reportruns.preset(), out, "csilocal", environment, ratio, 0)
            finish(run, [loss])
            found[environment, ratio] = run.curve()
    return found


def test_fig5_as_in_the_paper_holds(tmp_path: Path) -> None:
    found = points(
        tmp_path,
        {"indoor": (0.5, 0.4, 0.3), "outdoor": (0.6, 0.5, 0.4), "noniid": (0.9, 0.7, 0.5)},
    )
    assert holds([*fig5.claims(found, COMPRESSION)]) == [True] * 4


def test_a_line_of_fig5_by_hand(tmp_path: Path) -> None:
    run = runs.make(reportruns.preset(), tmp_path, "csilocal", "indoor", 16, 0)
    finish(run, [0.8, 0.6, 0.4, 0.2], spread=0.1)
    fig5.write_csv(tmp_path / "fig5.csv", {("indoor", 16): run}, {("indoor", 16): run.curve()})
    [line] = csv.DictReader((tmp_path / "fig5.csv").read_text().splitlines())
    figures = {name: float(value) for name, value in line.items() if name != "environment"}
    assert figures == pytest.approx(
        {
            **{"c": 8, "compression_ratio": 1 / 16, "test_loss": 0.4, "nmse_db": -4},
            **{"floor_loss": 1, "lowest_ue_loss": 0.15, "highest_ue_loss": 0.25},
        }
    )


def test_fig5_against_the_paper_does_not_hold(tmp_path: Path) -> None:
    found = points(
        tmp_path,
        {"indoor": (0.5, 0.4, 0.3), "outdoor": (0.9, 0.5, 0.4), "noniid": (0.8, 1.2, 0.7)},
    )
    learns, highest, falls, pronounced = fig5.claims(found, COMPRESSION)
    assert (learns.holds, learns.ours) == (False, "below the floor at 8 of 9 points")
    assert (highest.holds, highest.ours) == (False, "at 2 of 3 ratios")
    assert falls.holds is False  # one of two steps down
    assert "Outdoor: +5.00e-01" in pronounced.ours
    assert pronounced.holds is False


def test_fig5_with_missing_runs_is_not_judged_but_drawn(tmp_path: Path) -> None:
    found = points(tmp_path, {"indoor": (0.5, 0.4, 0.3)})
    assert holds([*fig5.claims(found, COMPRESSION)]) == [None] * 4
    fig5.draw(found)


# Fig. 6


def panels(out: Path, losses: Mapping[tuple[str, str], list[float]], **shape: float) -> Panels:
    """Curves; CSILocal exchanges 10 per evaluation, the others 50, spread as given by panel."""
    found: dict[tuple[str, str], Curve] = {}
    for (panel, method), values in losses.items():
        run = runs.make(reportruns.preset(), out, method, *PANELS[panel], 0)
        scalars = 10 if method == "csilocal" else 50
        finish(run, values, scalars=scalars, spread=shape.get(panel, 0.0))
        found[panel, method] = run.curve()
    return found


def paper_like(last: Mapping[str, float]) -> dict[tuple[str, str], list[float]]:
    """CSILocal ends at the loss given per panel, a benchmark 5 % above; in f, 5 % below."""
    return {
        (panel, m): [0.9, loss if m == "csilocal" else loss * (0.95 if panel == "f" else 1.05)]
        for panel, loss in last.items()
        for m in METHODS
    }


LIKE_THE_PAPER = {"a": 0.3, "b": 0.2, "c": 0.6, "d": 0.5, "e": 0.4, "f": 0.3}
SPREADS = {"a": 0.02, "b": 0.01, "c": 0.08, "d": 0.06, "e": 0.04, "f": 0.03}


def test_fig6_as_in_the_paper_holds(tmp_path: Path) -> None:
    found = panels(tmp_path, paper_like(LIKE_THE_PAPER), **SPREADS)
    for i, loss in enumerate(found["c", "csilocal"].loss):  # (c) is above (a) and (e) in the end
        assert i == 0 or loss > found["e", "csilocal"].loss[i]
    assert holds([*fig6_claims(found)]) == [True] * 9


def test_fig6_against_the_paper_does_not_hold(tmp_path: Path) -> None:
    upside_down = {panel: 1 - loss for panel, loss in LIKE_THE_PAPER.items()}
    spreads = {panel: 0.1 - spread for panel, spread in SPREADS.items()}
    found = panels(tmp_path, paper_like(upside_down), **spreads)
    assert holds([*fig6_claims(found)])[2:8] == [False] * 6
    # one pair of three is enough to fail
    spreads = SPREADS | {"e": 0.03, "f": 0.04}
    found = panels(tmp_path / "again", paper_like(LIKE_THE_PAPER), **spreads)
    assert holds([*fig6_claims(found)])[2:8] == [True, True, True, True, True, False]
    # non-IID has to be above both others, and rivals that end lower to have exchanged more
    high = replace(found["e", "csilocal"], loss=[2.0] * len(found["e", "csilocal"].loss))
    less = replace(found["f", "fedavg"], scalars=[1] * len(found["f", "fedavg"].scalars))
    changed = {**found, ("e", "csilocal"): high, ("f", "fedavg"): less}
    assert [holds([*fig6_claims(found)])[n] for n in (4, 8)] == [True, True]
    assert [holds([*fig6_claims(changed)])[n] for n in (4, 8)] == [False, False]


def test_fig6_names_who_is_lower_at_the_same_exchange(tmp_path: Path) -> None:
    losses = paper_like({"f": 0.3})
    losses["f", "fedgrad"] = [0.1, 0.1]
    losses["f", "csilocal"] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]  # 60 exchanged, fedgrad has 50 at 0.1
    lowest, similar, *_ = fig6_claims(panels(tmp_path, losses))
    assert lowest.holds is False
    assert lowest.ours == "in 0 of 1 panels; lower: fedgrad in (f)"
    assert (similar.holds, similar.ours) == (False, "(f) ×5.00")


def test_fig6_does_not_judge_what_is_missing(tmp_path: Path) -> None:
    found = panels(tmp_path, {("a", "csilocal"): [0.5], ("a", "fedavg"): [0.6]})
    assert set(holds([*fig6_claims(found)])) == {None}
    fig6.draw(found, "bytes")


def test_collecting_draws_what_there_is_and_lists_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = presets.load("laptop")
    methods: tuple[str, ...] = ("csilocal", "fedavg", REFERENCE)
    for method in methods:
        finish(runs.make(preset, tmp_path, method, "outdoor", 4, 0), [0.5, 0.4])
    assert fig6.run(options(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "3 of 48 runs are finished" in shown.err
    assert shown.err.count("not started yet") == 45
    page = (tmp_path / "fig6.md").read_text()
    assert "45 run(s) are not in this report" in page
    assert "- fedgrad-outdoor-c64-seed0: not started yet" in page
    rows = list(csv.DictReader((tmp_path / "fig6.csv").open()))
    assert len(rows) == 6
    assert (rows[1]["scalars"], rows[1]["bytes"], rows[1]["test_loss"]) == ("200", "800", "0.4")
    for name in ("fig6.png", "fig6_bytes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "logs").exists()


# the headline


def seeds(
    out: Path, losses: Mapping[str, list[list[float]]], scalars: Mapping[str, int]
) -> headline.Curves:
    found: dict[tuple[str, int], Curve] = {}
    for method, by_seed in losses.items():
        for seed, values in enumerate(by_seed):
            run = runs.make(reportruns.preset(), out, method, *PANELS["f"], seed)
            finish(run, values, scalars=scalars[method])
            found[method, seed] = run.curve()
    return found


def test_the_headline_by_hand(tmp_path: Path) -> None:
    curves = seeds(
        tmp_path,
        {
            "csilocal": [[0.8, 0.6, 0.4], [0.7, 0.5, 0.3]],
            "fedavg": [[0.46, 0.4], [0.8, 0.2]],
            "fedprox": [[0.9, 0.1], [0.46, 0.1]],
        },
        {"csilocal": 100, "fedavg": 500, "fedprox": 100},
    )
    common = headline.common_loss(curves)
    assert common == 0.4  # CSILocal and FedAvg, first seed
    loss = headline.given_loss(curves, common)
    assert loss == pytest.approx(FLOOR - 0.9 * (FLOOR - 0.4))  # 0.46
    other = replace(curves["fedavg", 0], floor=FLOOR + 1)
    assert headline.floor([*curves.values(), other]) == FLOOR  # the lowest
    # CSILocal: 200 + 100 · 0.14/0.2 = 270 and 200 + 100 · 0.04/0.2 = 220
    assert headline.ratios(curves, "csilocal", loss) == pytest.approx([1, 1])
    # FedAvg: 500, and 500 + 500 · 0.34/0.6; FedProx: 100 + 100 · 0.44/0.8, and 100
    assert headline.ratios(curves, "fedavg", loss) == pytest.approx([500 / 270, 783.333 / 220])
    assert headline.ratios(curves, "fedprox", loss) == pytest.approx([155 / 270, 100 / 220])
    claims = headline.claims(curves, loss, seeds=2)
    assert [claim.holds for claim in claims] == [True, True, False, False]
    assert {claim.holds for claim in headline.claims(curves, loss, seeds=3)} == {None}
    # FedProx needs 112.5 until 0.8, and in the other seed as much as CSILocal: not in every seed
    assert headline.ratios(curves, "fedprox", 0.8) == pytest.approx([1.125, 1])
    _, _, more, papers = headline.claims(curves, 0.8, seeds=2)
    assert more.holds is papers.holds is False
    assert claims[0].ours == "2.71 times (median of 2 of 2 seeds: 1.85, 3.56)"
    headline.write_csv(tmp_path / "headline.csv", curves, common)
    lines = csv.DictReader((tmp_path / "headline.csv").read_text().splitlines())
    line = next(
        x for x in lines if (x["method"], x["seed"], x["share"]) == ("csilocal", "0", "0.9")
    )
    until = [float(line[f"{unit}_until"]) for unit in ("scalars", "bytes")]
    assert until == pytest.approx([270, 4 * 270])
    assert [float(line["loss"]), float(line["lowest_loss"])] == pytest.approx([0.46, 0.4])
    page = headline.verdict(curves, common, 2, None, "")
    assert "The given loss is **4.600e-01**" in page
    assert "| FedAvg | 2.39 times" not in page
    assert "| … at least 2.39 times as much (judged: the median) | 2.39 times |" in page
    assert "at least 1.95 times" in page
    headline.draw(curves, common, loss)
    paper = headline.verdict(curves, common, 2, 0.5, "")
    assert "The given loss is **5.000e-01**. It is the preset" in paper
    # at 0.5: CSILocal 250 and 200, FedAvg 500 and 750
    assert "| FedAvg | 0.00; 0.00, 0.00 | 2.88; 2.00, 3.75 | 2 of 2 |" in paper


def test_the_headline_is_not_judged_without_its_methods_or_without_learning(
    tmp_path: Path,
) -> None:
    scalars: dict[str, int] = {"csilocal": 100, "fedavg": 100, "fedprox": 100}
    two = seeds(tmp_path / "a", {"csilocal": [[0.5]], "fedavg": [[0.5]]}, scalars)
    flat = seeds(
        tmp_path / "b", {"csilocal": [[0.5]], "fedavg": [[1.1]], "fedprox": [[0.4]]}, scalars
    )
    for curves in (two, flat):
        common = headline.common_loss(curves)
        assert common is None
        assert {claim.holds for claim in headline.claims(curves, common, 1)} == {None}
        assert "can't be judged" in headline.verdict(curves, common, 2, None, "")


def test_the_papers_ratios() -> None:
    assert [round(headline.paper_ratio(m), 2) for m in ("fedavg", "fedprox")] == [2.39, 1.95]
