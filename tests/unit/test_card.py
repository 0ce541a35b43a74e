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

from csipipe import channels, checkpoint
from csipipe.evaluation import command as evaluation
from csipipe.evaluation import leak
from csipipe.export import command
from csipipe.export.parts import nmse_db
from csipipe.export.parts import run as through
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


def test_best_weights_are_handed_on_with_their_iteration(tmp_path: Path) -> None:
    worker = trainedruns.finish(tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best"
    worker.save_weights(best.with_name("best-4.partial"))
    checkpoint.switch(best.with_name("best-4.partial"), best)
    pack(tmp_path / "run", "--weights", "best", "--pack", tmp_path / "zoo")
    assert json.loads((tmp_path / "zoo" / card.CARD).read_text())["iterations"] == 4
    copy = best.resolve().rename(best.with_name("copy"))
    best.unlink()
    copy.rename(best)  # nobody knows any more
    pack(tmp_path / "run", "--weights", "best", "--pack", tmp_path / "zoo")
    assert json.loads((tmp_path / "zoo" / card.CARD).read_text())["iterations"] is None
    again = trained.read(tmp_path / "zoo")
    assert (again.state, again.finished) == ("weights, run handed on", False)


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


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": [], "iterations": 1}', '{"files": {}, "iterations": "1"}']
)
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
    with pytest.raises(ValueError, match=r"--half is for .*: add --pack DIR"):
        pack(tmp_path / "run", "--ue", 0, "--half")


def test_an_interrupt_leaves_what_was_packed_before(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in packed.rglob("*.*")}

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "run", "--ue", 1, "--pack", packed)
    assert {file.name: file.read_bytes() for file in packed.rglob("*.*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "zoo"]
    pack(tmp_path / "run", "--ue", 1, "--pack", packed)
    assert not (packed / "weights" / "ue-1.safetensors").exists()


def test_half_the_bytes_hold_the_weights_that_the_card_speaks_of(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    pack(tmp_path / "run", "--pack", tmp_path / "half", "--half")
    pack(tmp_path / "half", "--pack", tmp_path / "again", "--half")  # rounds nothing any more
    source, half = trained.read(tmp_path / "run"), trained.read(tmp_path / "half")
    for ue in range(4):
        stored = load_file(tmp_path / "half" / "weights" / f"ue-{ue}.safetensors")
        exact, rounded = source.ue_weights(ue), half.ue_weights(ue)
        for name, tensor in exact.items():
            narrow = tensor.ndim > 1
            assert stored[name].dtype == (torch.float16 if narrow else tensor.dtype), name
            assert rounded[name].dtype == tensor.dtype, name
            assert torch.equal(rounded[name], tensor.half().float() if narrow else tensor), name
        assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    told = json.loads((tmp_path / "half" / card.CARD).read_text())
    again = json.loads((tmp_path / "again" / card.CARD).read_text())
    h = torch.from_numpy(channels.rows_of(*channels.tested(half.own)))
    assert told["figures"]["nmse_db"] == [nmse_db(through(m, h), h) for m in half.models()]
    assert evaluation.main([str(tmp_path / "half"), "--train.threads=1"]) == 0
    [seen] = json.loads((tmp_path / "half" / "evaluation" / "figures.json").read_text())["runs"]
    assert [ue["nmse_db"] for ue in seen["per_ue"]] == pytest.approx(
        told["figures"]["nmse_db"], abs=1e-4
    )
    assert told["stored"].startswith("matrices and kernels in float16")
    for name in ("figures", "trained", "files"):
        assert told[name] == again[name], name
    with pytest.raises(
        ValueError, match=r"a has weights up to 1e\+05, float16 ends at 65,504; keep"
    ):
        checkpoint.halved({"a": torch.tensor([[1.0, -1e5]])})


def test_a_card_says_what_a_run_went_on_from(packed: Path, tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "second", train={"init": str(packed), "lr": 0.5})
    trainedruns.finish(tmp_path / "third", train={"init": str(tmp_path / "second")})
    for source, out in (("third", "a"), ("a", "b")):
        pack(tmp_path / source, "--pack", tmp_path / out)
        told = json.loads((tmp_path / out / card.CARD).read_text())["trained"]
        assert (told["ues"], told["from"]["run"], told["from"]["lr"]) == (4, "second", 0.5)
        assert told["from"]["from"]["run"] == "zoo"
        assert told["from"]["from"]["from"] is None
        assert str(tmp_path) not in json.dumps(told)
    (packed / card.CARD).unlink()
    (packed / "config.yaml").unlink()
    pack(tmp_path / "second", "--pack", tmp_path / "c")
    told = json.loads((tmp_path / "c" / card.CARD).read_text())["trained"]
    assert told["from"] == {"run": "zoo", "state": "unknown"}


def test_bits_are_learnt_without_the_manifest_of_the_run(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(packed, "--ue", 1, "--bits", 4, "--formats", "pt2")
    printed = capsys.readouterr().out
    assert "isn't finished" not in printed
    assert "96 bits, 4 bits for each of 24 entries" in printed
    assert evaluation.main([str(packed), "--bits", "--train.threads=1"]) == 0
    assert "4 bits an entry" in capsys.readouterr().out
    assert leak.main([str(packed)]) == 1
    assert "handed on, and doesn't say which rows each UE had" in capsys.readouterr().err
