"""launch/evaluate.py's ranks: the figures of one process, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trainedruns
from harness import run_world

from csipipe.comm.world import World
from csipipe.evaluation import command
from csipipe.settings.commandline import RunParser


def evaluate(world: World | None, run: str, out: str, *more: str) -> None:
    """The command on one rank."""
    parser = RunParser("evaluate", "")
    command.add_arguments(parser)
    arguments = [run, "--data.test_samples", "600", "--train.threads", "1", "--out", out, *more]
    options, settings = parser.parse(arguments)
    command.run(options, settings, world)


@pytest.mark.parametrize("ranks", [3])
def test_ranks_share_the_rows_and_find_the_same(ranks: int, tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    evaluate(None, str(tmp_path / "run"), str(tmp_path / "alone"))
    run_world(ranks, evaluate, str(tmp_path / "run"), str(tmp_path / "ranks"))
    for name in ("figures.json", "table.txt"):
        alone, together = (tmp_path / where / name for where in ("alone", "ranks"))
        assert alone.read_text() == together.read_text()
    assert json.loads((tmp_path / "alone/figures.json").read_text())["test"]["rows"] == {
        "indoor": 600
    }
