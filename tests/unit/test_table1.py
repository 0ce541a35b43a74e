"""Table I without measuring: plan, bound, files, verdict."""

from __future__ import annotations

import argparse
import csv
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csipipe.reports import table1, table1_output
from csipipe.reports.table1_output import Row


def row(environment: str = "indoor", batch_size: int = 400, saved: float = 0.2) -> Row:
    without = [1.0, 2.0, 4.0]
    return Row(environment, 256, batch_size, 10, [t * (1 - saved) for t in without], without)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    table1.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "best"), [(2, 2, 0.25), (2, 20, 0.475), (4, 1, 0)]
)
def test_bound(stages: int, micro_batches: int, best: float) -> None:
    assert table1_output.bound(stages, micro_batches) == pytest.approx(best)


def test_cells_are_the_papers() -> None:
    assert [(c.environment, c.c, c.batch_size) for c in table1.ALL] == list(table1_output.PAPER)
    assert len(table1.QUICK) == 4
    plan = table1.Plan()
    with_pipeline, without = plan.candidates(table1.ALL[3])
    assert with_pipeline.settings.model.c2 == 512
    assert with_pipeline.settings.train.batch_size == 800
    assert [with_pipeline.settings.stages, without.settings.stages] == [2, 1]
    assert with_pipeline.settings.train == without.settings.train
    assert [with_pipeline.ranks, without.ranks] == [4, 3]


def test_time_is_shared_by_rows() -> None:
    shares = table1._shares(table1.ALL, 2400)
    assert sum(shares.values()) == pytest.approx(2400)
    assert shares[table1.ALL[1]] == 2 * shares[table1.ALL[0]]


def test_a_turn_lasts_a_second_at_least() -> None:
    seconds = 0.3

    def turns(*_: object) -> dict[str, SimpleNamespace]:
        return {"ours": SimpleNamespace(seconds=0.1), "other": SimpleNamespace(seconds=seconds)}

    race: Any = SimpleNamespace(warm_up=turns, practise=turns, crowded=False, iterations=1)
    table1._warm_up(race, None)
    assert race.iterations == 4  # of the slowest
    race.iterations, seconds = 1, 2.0
    table1._warm_up(race, None)
    assert race.iterations == 1


def test_a_cell_has_three_rounds_whatever_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def round_() -> dict[str, SimpleNamespace]:
        rounds.append(1)
        return {"ours": SimpleNamespace(seconds=0.5)}

    rounds: list[int] = []
    race = SimpleNamespace(start=lambda _: None, round=round_, failures={})
    monkeypatch.setattr(table1, "Race", lambda _: race)
    monkeypatch.setattr(table1, "_warm_up", lambda *_: None)
    monkeypatch.setattr(table1, "as_json", lambda _: {"found": len(rounds)})
    (tmp_path / "cells").mkdir()
    nobody: Any = nullcontext()
    for share, wanted in ((0.0, 3), (1e6, 7)):
        rounds.clear()
        found = table1.measure(table1.Plan(), table1.ALL[0], tmp_path, 7, share, nobody)
        assert found["found"] == wanted


def test_options_that_cannot_be_used(tmp_path: Path) -> None:
    folder = ("--out", str(tmp_path / "t"))
    for wrong, message in (
        (("--rounds", "2"), "--rounds is 2"),
        (("--stages", "1"), "--stages is 1"),
        (("--micro-batches", "3"), "not divisible by train.micro_batches 3"),
        (("--ue-ranks", "11"), "--ue-ranks is 11"),
        (("--minutes", "-1"), "--minutes is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            table1.run(options(*folder, *wrong))
    assert not (tmp_path / "t").exists()


def test_a_folder_of_another_plan_or_machine_is_refused(tmp_path: Path) -> None:
    table1.claim(table1.Plan(), tmp_path)
    table1.claim(table1.Plan(), tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} holds cells .* stages 2, not 4"):
        table1.claim(table1.Plan(stages=4), tmp_path)
    file = tmp_path / "plan.json"
    other = json.loads(file.read_text())
    other["machine"]["cores"] = 12345
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="cores 12345, not"):
        table1.claim(table1.Plan(), tmp_path)
    for broken in ("[]", "{}", "no"):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"plan\.json isn't a plan"):
            table1.claim(table1.Plan(), tmp_path)


def test_the_last_lines_say_where_the_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"seconds": [1.0, 1.1, 1.2], "settings": {"topology": {"ues": 10}}}
    (tmp_path / "cells").mkdir()
    for cell in table1.QUICK:
        content: dict[str, object] = {"cell": asdict(cell), "with": "ours", "without": "other"}
        content["candidates"] = {"ours": found, "other": found}
        (tmp_path / "cells" / f"{cell.name}.json").write_text(json.dumps(content))
    table1.run(options("--quick", "--out", str(tmp_path)))
    last = [Path(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert last == [tmp_path / f"table1.{ending}" for ending in ("csv", "png", "md")]
    assert all(file.exists() for file in last)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"candidates": {}, "with": "ours"}'])
def test_a_broken_cell_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "indoor-256-400.json").write_text(content)
    with pytest.raises(ValueError, match=r"indoor-256-400\.json isn't a finished cell"):
        table1.read(tmp_path)


def test_both_percentages_are_medians_of_rounds() -> None:
    one = Row("indoor", 256, 400, 10, [1.0, 1.0, 3.0], [2.0, 1.25, 3.0])
    assert one.saved == pytest.approx([0.5, 0.2, 0.0])
    assert one.gain == pytest.approx([1.0, 0.25, 0.0])
    text = table1_output.verdict([one], 0.25, 2, 2)
    line = next(line for line in text.splitlines() if line.startswith("| indoor"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "indoor, c 256, B 400",
        "1.000 [1.000, 2.000]",
        "2.000 [1.625, 2.500]",
        "20.0% [10.0%, 35.0%]",
        "25.0% [12.5%, 62.5%]",
        "0.0560 / 0.0583",
        "3.9%",
        "4.1%",
    ]
    assert "25.0% saved" in text
    assert "*Saved* is the median over rounds of 1 − t_with/t_without" in text
    assert (
        "needn't be what the median times beside them would give" in text
    )  # these would be 50% and 100%
    caption = table1_output.picture([one], 0.25).get_supxlabel()
    assert "the median of\n1 − t_with/t_without of each round" in caption


def test_the_verdict_says_what_the_figures_say() -> None:
    text = table1_output.verdict([row(saved=0.2), row(batch_size=800, saved=0.1)], 0.25, 2, 2)
    assert (
        "saves 10.0% to 20.0% of the time; in the same cells the paper saves 3.9% to 17.9%." in text
    )
    assert "More than the paper's is saved in 1 of 2 cells, less in 1; in 0" in text
    assert "At 800 samples per UE it saves less than at 400 (10.0% [10.0%, 10.0%], 20.0%" in text
    assert text.endswith("The best cell reaches 80% of the bound.\n")
    assert "The quartiles include 0" not in text
    assert "Time is lost in: indoor, c 256, B 400." in table1_output.verdict(
        [row(saved=-0.1)], 0.25, 2, 2
    )


def test_the_verdict_says_what_is_within_the_noise() -> None:
    noisy = Row("indoor", 256, 800, 10, [1.3, 0.88, 0.7], [1.0, 1.0, 1.0])  # −30 %, 12 %, 30 %
    text = table1_output.verdict([noisy, row(saved=0.266)], 0.25, 2, 2)
    assert "saved in 1 of 2 cells, less in 0; in 1 the paper's is between the quartiles" in text
    assert "what is saved is within the noise: indoor, c 256, B 800." in text
    assert "it saves less than at 400 (12.0% [-9.0%, 21.0%]," in text
    text = table1_output.verdict([noisy, row(saved=0.2)], 0.25, 2, 2)
    assert "it saves the same, within the noise, as at 400 (12.0% [-9.0%, 21.0%], 20.0%" in text
    assert "noise of this machine" not in text


def test_time_is_lost_where_the_quartiles_say_so() -> None:
    slower = Row("indoor", 256, 800, 10, [1.3, 1.2, 1.1], [1.0, 1.0, 1.0])
    text = table1_output.verdict([slower, row()], 0.25, 2, 2)
    assert "Time is lost in: indoor, c 256, B 800." in text
    assert "include 0" not in text
    perhaps = Row("indoor", 256, 800, 10, [1.3, 1.05, 0.8], [1.0, 1.0, 1.0])
    text = table1_output.verdict([perhaps, row()], 0.25, 2, 2)
    assert "Time is lost" not in text
    assert "The quartiles include 0" in text


def test_the_verdict_says_that_more_than_the_bound_is_noise() -> None:
    text = table1_output.verdict([row(saved=0.265)], 0.25, 2, 2)
    assert "reaches 106% of the bound. What is above the bound is noise of this machine" in text


def test_csv_has_a_line_per_cell_and_columns_by_name(tmp_path: Path) -> None:
    table1_output.write(tmp_path, [row(), row("outdoor")], 2, 2)
    with (tmp_path / "table1.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["environment"] for line in lines] == ["indoor", "outdoor"]
    assert float(lines[0]["with_median"]) == pytest.approx(1.6)
    assert float(lines[0]["time_saved_q1"]) == pytest.approx(0.2)
    assert float(lines[0]["without_over_with_minus_1_median"]) == pytest.approx(0.25)
    assert lines[1]["paper_without"] == "0.0582"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["table1.csv", "table1.md", "table1.png"]
