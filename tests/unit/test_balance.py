"""A partition by measured time, and the file that keeps the times."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from csipipe import models
from csipipe.pipeline import balance
from csipipe.settings.config import ModelSettings, TopologySettings

MODEL = ModelSettings(c1=8, c2=8, angles=4, delays=4)
CPU = torch.device("cpu")
SECONDS = [3.0, 0.0, 1.0, 0.0, 5.0, 4.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("stages", "parts"),
    [(1, [0, 8]), (2, [0, 5, 8]), (3, [0, 4, 5, 8]), (4, [0, 4, 5, 6, 8])],
)
def test_the_longest_stage_is_as_short_as_can_be(stages: int, parts: list[int]) -> None:
    tail = models.build_tail(MODEL, 0)
    found = balance.cut(SECONDS, tail, stages)
    longest = max(balance.stage_seconds(SECONDS, found))
    assert longest == max(balance.stage_seconds(SECONDS, parts))
    assert [found[0], found[-1], len(found)] == [0, 8, stages + 1]


def test_every_stage_has_parameters() -> None:
    tail = models.build_tail(MODEL, 0)
    parts = balance.cut([0, 9, 0, 9, 0, 0, 9, 0], tail, 5)
    for start, stop in itertools.pairwise(parts):
        assert models.count_parameters(tail[start:stop])


def test_a_profile_is_measured_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    seconds = balance.profile(MODEL, 6, "fp32", CPU, str(file))
    assert len(seconds) == 8
    assert min(seconds) > 0
    assert balance.profile(MODEL, 6, "fp32", CPU, str(file)) == seconds
    assert [f.name for f in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("key", "value"), [("rows", 7), ("machine", "another"), ("model", {}), ("precision", "bf16")]
)
def test_a_profile_of_something_else_is_refused(tmp_path: Path, key: str, value: object) -> None:
    file = tmp_path / "profile.json"
    balance.profile(MODEL, 6, "fp32", CPU, str(file))
    with pytest.raises(ValueError, match=r"was measured with rows 6, this run has 5"):
        balance.profile(MODEL, 5, "fp32", CPU, str(file))
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"profile.json was measured with {key} .*delete it"):
        balance.profile(MODEL, 6, "fp32", CPU, str(file))


@pytest.mark.parametrize("seconds", [[0.1] * 7, [0.1] * 7 + [-0.1], [0.1] * 7 + [math.inf]])
def test_times_that_are_none_of_this_tails_layers_are_refused(
    tmp_path: Path, seconds: list[float]
) -> None:
    file = tmp_path / "profile.json"
    balance.profile(MODEL, 6, "fp32", CPU, str(file))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": seconds}))
    with pytest.raises(ValueError, match="expected 8 times in seconds; delete it"):
        balance.profile(MODEL, 6, "fp32", CPU, str(file))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": [1]}', '{"seconds": "x"}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"topology.profile: .*profile.json"):
        balance.profile(MODEL, 6, "fp32", CPU, str(file))


def test_the_report_names_cuts_times_and_imbalance() -> None:
    assert balance.report([0.003, 0.001, 0.002], [0, 1, 3]) == (
        "partition measured: layers cut at [1], 3.0, 3.0 ms per micro-batch and stage; "
        "imbalance (longest stage above the mean) 0%"
    )


def test_a_profile_without_measuring_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"'x', but topology\.partition null measures nothing"):
        TopologySettings(profile="x")
