"""Weights that are handed on with a card: what takes them, and what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trainedruns
from runs import small
from safetensors.torch import load_file, save_file

from csipipe.export import command
from csipipe.run import card, initial, trained
from csipipe.settings.commandline import RunParser


def pack(*arguments: object) -> None:
    parser = RunParser("export", "")
    command.add_arguments(parser)
    options, settings = parser.parse([str(argument) for argument in arguments])
    assert isinstance(options, Namespace)
    command.export(options, settings)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    trainedruns.finish(tmp_path / "run")
    pack(tmp_path / "run", "--pack", tmp_path / "zoo", "--licence", "CC0")
    return tmp_path / "zoo"


def test_what_is_handed_on_is_the_run(packed: Path, tmp_path: Path) -> None:
    told = json.loads((packed / card.CARD).read_text())
    assert (told["licence"], told["ues"], told["seed"]) == ("CC0", [0, 1, 2, 3], 0)
    assert len(told["figures"]["nmse_db"]) == 4
    assert str(tmp_path) not in (packed / "config.yaml").read_text() + json.dumps(told)
    rows = torch.rand(3, 2, 8, 8)
    run, again = trained.read(tmp_path / "run"), trained.read(packed)
    with torch.no_grad():
        for one, other in zip(run.models(), again.models(), strict=True):
            assert torch.equal(one(rows), other(rows))
    assert again.state == "iteration 10 of 10, run handed on"
    begun = initial.read(small(topology={"ues": 6}, train={"init": str(packed)}))
    assert begun is not None
    assert "UEs 4-5: their mean" in begun.note
    pack(packed, "--ue", 2, "--pack", tmp_path / "one")
    assert sorted(f.name for f in (tmp_path / "one" / "weights").iterdir()) == [
        "tail.safetensors",
        "ue-0.safetensors",
    ]
    [third] = trained.read(tmp_path / "one").models()
    with torch.no_grad():
        assert torch.equal(third(rows), run.models([2])[0](rows))


def test_a_file_that_is_not_what_the_card_says_is_refused(packed: Path) -> None:
    file = packed / "weights" / "ue-1.safetensors"
    tensors = load_file(file)
    tensors["head.0.bias"][0] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"ue-1.safetensors isn't what card.json says: .*again"):
        trained.read(packed)
    file.unlink()
    with pytest.raises(ValueError, match=r"ue-1.safetensors isn't .*: no such file instead of"):
        initial.read(replace(small(), train=replace(small().train, init=str(packed))))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": [], "iterations": 1}'])
def test_a_card_that_cannot_be_read_is_named(packed: Path, text: str) -> None:
    (packed / card.CARD).write_text(text)
    with pytest.raises(ValueError, match=r"card.json can't be read"):
        trained.read(packed)


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run exists and holds no card.json"):
        pack(tmp_path / "run", "--pack", tmp_path / "run")
    with pytest.raises(ValueError, match=r"--ue is missing; the run has UEs 0 … 3"):
        pack(tmp_path / "run")
