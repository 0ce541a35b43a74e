"""Checkpoints: what is written is what is read, and the newest whole ones stay."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from storedruns import run_in, snapshot

from csipipe import checkpoint
from csipipe.methods.state import NoMoments, Unit
from csipipe.pipeline.zero import ZeroMoments
from csipipe.settings.config import Settings, TrainSettings


def test_a_snapshot_says_what_was_written(tmp_path: Path) -> None:
    source = checkpoint.Snapshot(snapshot(tmp_path, 7))
    assert source.content["iteration"] == 7
    assert torch.equal(source.tensors("ue-0")["x"], torch.arange(5.0))
    with pytest.raises(ValueError, match="no part ue-1"):
        source.tensors("ue-1")


def test_parts_are_safetensors_files(tmp_path: Path) -> None:
    tensors = {
        "draws": torch.arange(3, dtype=torch.uint8),
        "half": torch.arange(3.0, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.empty(0, 4),
        "weight": torch.randn(2, 3),
        "moment": torch.randn(3, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
    }
    record = checkpoint.write_part(tmp_path, "ue-0", tensors)
    file = tmp_path / "ue-0.safetensors"
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record == checkpoint.Record(file.stat().st_size, sha256)


def test_a_state_crosses_as_one_vector_and_no_count_is_rounded() -> None:
    norm = torch.nn.BatchNorm2d(3)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.fill_(2**24 + 1)
    torch.nn.init.normal_(norm.weight)
    found = checkpoint.unflatten(checkpoint.flatten(norm), torch.nn.BatchNorm2d(3))
    for name, tensor in norm.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_changed_manifest_is_noticed(tmp_path: Path) -> None:
    file = snapshot(tmp_path, 7) / "manifest.json"
    file.write_text(file.read_text().replace('"iteration": 7', '"iteration": 8'))
    with pytest.raises(ValueError, match=r"manifest.json was altered .* delete"):
        checkpoint.Snapshot(file.parent)


def test_a_manifest_of_another_format_is_refused_an_older_one_too(tmp_path: Path) -> None:
    file = snapshot(tmp_path, 7) / "manifest.json"
    text = file.read_text()
    for version in (1, 3):
        file.write_text(text.replace('"format": 2', f'"format": {version}'))
        with pytest.raises(ValueError, match=f"has format {version}, this csipipe reads 2"):
            checkpoint.Snapshot(file.parent)


def test_a_snapshot_takes_the_place_of_an_earlier_attempts(tmp_path: Path) -> None:
    snapshot(tmp_path, 7)
    lr = Settings(train=TrainSettings(lr=0.5))
    found = checkpoint.Snapshot(snapshot(tmp_path, 7, lr))
    assert found.content["settings"]["train"]["lr"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer.weight": torch.zeros(2, 3)}, r"weight has shape \(2, 3\) instead of \(3, 2\)"),
        ({"layer.bias": None}, r"layer\.bias is missing"),
        ({"layer.more": torch.zeros(1)}, r"layer\.more belongs to no part of this run"),
    ],
)
def test_a_part_of_another_model_is_refused(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    unit = Unit({"layer": torch.nn.Linear(2, 3)}, NoMoments())
    changed = unit.state() | change
    with pytest.raises(ValueError, match=message):
        unit.load({name: tensor for name, tensor in changed.items() if tensor is not None})


def test_under_zero_adams_copy_begins_with_the_weights_too() -> None:
    layer, flat = torch.nn.Linear(2, 3), torch.full((9,), 7.0)
    for start, parameter in ((0, layer.weight), (6, layer.bias)):
        address = SimpleNamespace(start=start, numel=parameter.numel())
        place: Any = SimpleNamespace(
            param_group_index=0, get_hp_fragment_address=lambda address=address: address
        )
        vars(parameter)["_hp_mapping"] = place
    state = {flat: {"step": torch.tensor(3.0)}}
    adam = SimpleNamespace(single_partition_of_fp32_groups=[flat])
    adam.optimizer = SimpleNamespace(state=state)
    weights = {"layer.weight": torch.arange(6.0).view(3, 2), "layer.bias": torch.arange(6.0, 9.0)}
    Unit({"layer": layer}, ZeroMoments(adam)).begin(weights)
    assert flat.tolist() == list(range(9))
    assert not state


def test_the_newest_whole_ones_are_kept(tmp_path: Path) -> None:
    for iteration in (5, 10, 100, 20):
        snapshot(tmp_path, iteration)
    checkpoint.prune(tmp_path, keep=2)
    (tmp_path / "200.partial").mkdir()
    (tmp_path / "150").mkdir()  # one that lost its manifest while it was removed
    assert checkpoint.newest(tmp_path) == tmp_path / "100"
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "20"]


def test_a_checkpoint_is_found_from_inside_and_in_a_run_that_is_called_by_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "7"
    run_in(run, Settings())
    (run / "manifest.json").write_text("{}")  # its rows
    with pytest.raises(ValueError, match=rf"{run} is neither a checkpoint nor .* run with one"):
        checkpoint.find(run)
    first, second = (snapshot(run / "checkpoints", n) for n in (10, 20))
    assert checkpoint.find(run) == second
    monkeypatch.chdir(first)
    for path in (".", "../10", first):
        assert checkpoint.find(Path(path)) == first
    monkeypatch.chdir(first.parent)
    assert checkpoint.find(Path("10")) == first


def test_a_link_stands_for_one_set_of_weights(tmp_path: Path) -> None:
    for text in ("one", "two"):
        partial = tmp_path / "best-3.partial"  # the same iteration twice, after going on
        partial.mkdir()
        (partial / "file").write_text(text)
        checkpoint.switch(partial, tmp_path / "best")
        assert (tmp_path / "best" / "file").read_text() == text
    assert len(list(tmp_path.iterdir())) == 2
