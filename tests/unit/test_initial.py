"""Runs that start from another run's weights: what is taken, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import trainedruns
from runs import CPU, small

from csipipe import methods, models
from csipipe.methods import roster
from csipipe.methods.centralised import Centralised
from csipipe.methods.common import shared_modules
from csipipe.methods.state import BTS, NoMoments, Unit
from csipipe.run import initial, joining
from csipipe.settings.config import CodecSettings, ModelSettings, Settings, TrainSettings


def begun(settings: Settings, shared: bool = False) -> tuple[Centralised, initial.Initial]:
    """An unsplit run that has taken its weights from `train.init`."""
    torch.set_num_threads(1)
    ues, test = methods.load(settings, range(settings.topology.ues), CPU)
    worker = Centralised(settings, ues, test, CPU, shared)
    source = initial.read(settings)
    assert source is not None
    source.give(worker)
    return worker, source


def wanting(run: Path, ues: int, **train: object) -> Settings:
    return small(topology={"ues": ues}, train={"init": str(run), **train})


def test_ues_keep_their_parts_and_newcomers_start_from_the_mean_or_fresh(tmp_path: Path) -> None:
    before = trainedruns.finish(tmp_path / "run")
    worker, source = begun(wanting(tmp_path / "run", 5))
    for mine, theirs in zip(worker.ues, before.ues, strict=False):
        for name, tensor in theirs.parts.state_dict().items():
            assert torch.equal(mine.parts.state_dict()[name], tensor), name
        assert not mine.optimizer.state  # moments are its own
    for name, tensor in before.tail.state_dict().items():
        assert torch.equal(worker.tail.state_dict()[name], tensor), name
    heads = torch.stack([ue.head.get_parameter("0.weight") for ue in before.ues])
    assert torch.equal(worker.ues[4].head.get_parameter("0.weight"), heads.mean(0))
    assert "UEs 0-3; UE 4: their mean" in source.note
    fresh, source = begun(wanting(tmp_path / "run", 6, newcomers="fresh", freeze="tail"))
    drawn = models.build_head(fresh.settings.model, fresh.settings.train.seed)
    assert torch.equal(fresh.ues[4].head.get_parameter("0.weight"), drawn.get_parameter("0.weight"))
    assert not any(p.requires_grad for p in fresh.tail.parameters())
    assert "UEs 4-5: drawn by train.seed; frozen: tail" in source.note


def test_ues_keep_a_frozen_part_that_a_method_would_have_averaged(tmp_path: Path) -> None:
    before = trainedruns.finish(tmp_path / "run")
    settings = wanting(tmp_path / "run", 4, freeze="encoder")
    worker, _ = begun(replace(settings, method="splitfed"))
    for part, whose in (("encoder", 2), ("head", 0)):  # heads start as one, the first UE's
        mine, theirs = getattr(worker.ues[2], part), getattr(before.ues[whose], part)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), (part, name)
    assert not torch.equal(
        before.ues[2].encoder.get_parameter("0.weight"),
        before.ues[0].encoder.get_parameter("0.weight"),
    )


@pytest.mark.parametrize(
    ("method", "freeze", "taken"),
    [
        ("fedavg", None, "encoder and head of UE 0 for all"),
        ("centralised", None, "encoder and head of UE 0 for all"),
        ("fedavgper", None, "head of UE 0 for all, encoder of UEs 0-3; UE 4: their mean"),
        ("splitfed", "head", "encoder of UE 0 for all, head of UEs 0-3; UE 4: their mean"),
    ],
)
def test_what_ues_share_is_said_to_be_the_first_ones(
    method: str, freeze: str | None, taken: str, tmp_path: Path
) -> None:
    trainedruns.finish(tmp_path / "run")
    source = initial.read(replace(wanting(tmp_path / "run", 5, freeze=freeze), method=method))
    assert source is not None
    frozen = f"; frozen: {freeze}" if freeze else ""
    assert source.note.endswith(f"): the tail, {taken}{frozen}")


def test_a_run_goes_on_as_well_as_the_other_ended(tmp_path: Path) -> None:
    before = trainedruns.finish(tmp_path / "run")
    worker, _ = begun(wanting(tmp_path / "run", 4))
    assert torch.equal(worker.evaluate("test").sums, before.evaluate("test").sums)


def test_an_encoder_gets_a_range_or_loses_it(tmp_path: Path) -> None:
    before = trainedruns.finish(tmp_path / "run")
    settings = wanting(tmp_path / "run", 4)
    codec = replace(settings.comm.codec, smashed="int4")
    with_range = replace(settings, comm=replace(settings.comm, codec=codec, scale="range"))
    worker, _ = begun(with_range)
    state, wanted = (run.ues[1].encoder.state_dict() for run in (worker, before))
    assert torch.equal(state["inner.0.weight"], wanted["0.weight"])
    assert not state["learnt"]
    weights = {f"encoder.{name}": tensor for name, tensor in state.items()}
    plain = initial.as_ranged(weights, before.ues[1].unit().state())
    assert torch.equal(plain["encoder.0.weight"], wanted["0.weight"])


def test_what_the_bts_keeps_has_no_range(tmp_path: Path) -> None:
    """A federated method begins with a run that was trained for four bits."""
    comm = {"codec": CodecSettings(smashed="int4"), "scale": "range"}
    before = trainedruns.finish(tmp_path / "run", comm=comm)
    settings = small("fedgrad", topology={"stages": None}, train={"init": str(tmp_path / "run")})
    source = initial.read(settings)
    assert source is not None
    parts = shared_modules(settings, CPU)
    units = {BTS: Unit(dict(parts), NoMoments())}
    source.give(cast(methods.Worker, SimpleNamespace(units=lambda: units)))
    wanted = before.ues[0].encoder.state_dict()["inner.0.weight"]
    assert torch.equal(parts["encoder"].state_dict()["0.weight"], wanted)


def test_another_model_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    settings = wanting(tmp_path / "run", 4)
    for change, message in (
        ({"c1": 12}, r"holds a model with model.c1 24, this run's has 12\. Give the same"),
        ({"angles": 16}, r"model.angles 8, this run's has 16"),
        ({"name": "crnet", "c2": 16}, "model.name csilocal, this run's has crnet"),
        ({"c2": None}, r"model.c2 16, this run's has null\."),
        ({"head": "crblock"}, "model.head linear, this run's has crblock"),
    ):
        with pytest.raises(ValueError, match=message):
            initial.read(replace(settings, model=replace(settings.model, **change)))
    assert initial.read(replace(settings, model=replace(settings.model, kernels_by="llvm")))
    with pytest.raises(ValueError, match=r"train.init: .*nowhere is not a run's directory"):
        initial.read(wanting(tmp_path / "nowhere", 4))


def test_a_newcomer_has_joined_when_it_is_near_the_others(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    history = [
        {
            "iteration": done,
            "bytes_of_each": [0, 0, 0, 0, 120 * done],
            "test": {
                "per_ue": [
                    {"ue": ue, "nmse_db": db} for ue, db in ((0, -4.0), (3, -4.0), (4, mine))
                ]
            },
        }
        for done, mine in ((5, -1.0), (10, -3.6), (15, -4.0))
    ]
    settings = wanting(tmp_path / "run", 5)
    [found] = joining.joined(settings, history)
    assert found == joining.Joined(ue=4, iterations=10, samples=80, bytes=1200)
    steps = small("fedavgper", topology={"ues": 5}, train={"init": str(tmp_path / "run")})
    steps = replace(steps, train=replace(steps.train, local_steps=3))
    assert joining.joined(steps, history)[0].samples == 240
    some = replace(settings, topology=replace(settings.topology, participants=2))
    taken = sum(4 in roster.drawn(some, iteration) for iteration in range(10))
    assert taken != 10 * 2 / 5  # of the UE itself, not of all on average
    assert joining.joined(some, history)[0].samples == taken * 8
    [found] = joining.joined(wanting(tmp_path / "run", 5), history[:1])
    assert found.iterations == 0
    assert joining.joined(wanting(tmp_path / "run", 4), history) == []
    assert joining.joined(small(), history) == []
    assert joining.joined(replace(steps, method="fedavg"), history) == []
    assert joining.joined(wanting(tmp_path / "gone", 5), history) == []


@pytest.mark.parametrize("parts", ["body", "encoder,tail,head", "", "tail, head"])
def test_a_part_that_does_not_exist_cannot_be_frozen(parts: str) -> None:
    with pytest.raises(ValueError, match="expected one or two of encoder, tail, head"):
        small(train={"freeze": parts})


def test_a_federated_method_must_have_something_to_exchange() -> None:
    with pytest.raises(ValueError, match="are all the parts that fedavgper exchanges"):
        small("fedavgper", topology={"stages": None}, train={"freeze": "tail,head"})


@pytest.mark.parametrize(
    ("method", "model", "freeze"),
    [
        ("splitfed", "linear", "encoder"),
        ("splitfed", "crnet", "encoder"),
        ("fedavgper", "clnet", "tail"),
        ("fedgrad", "transnet", "encoder,tail"),
    ],
)
def test_a_head_without_parameters_is_nothing_to_exchange(
    method: str, model: str, freeze: str
) -> None:
    """Refused by a rank alone, before it meets the others."""
    settings = Settings(
        method=method,
        model=ModelSettings(name=model, c1=16, angles=8, delays=8),
        train=TrainSettings(freeze=freeze),
    )
    message = f"train.freeze is {freeze}, .* only head of model.name {model} would be left, with"
    with pytest.raises(ValueError, match=message):
        methods.prepare(settings, 0, 4, CPU)
