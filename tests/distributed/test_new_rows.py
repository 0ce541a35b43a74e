"""What adding a method, a model or a source takes: what is in this file, and a row."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, joined, small, splits, unsplit
from test_evaluate import evaluate
from test_resume import ALL, HALF, resumed, straight, together
from torch import Tensor, nn

from csipipe import channels, methods
from csipipe.channels.source import SITES, Images, Kind, Part, Site, Source
from csipipe.comm import ledger
from csipipe.comm.world import World
from csipipe.methods import federated
from csipipe.methods.aggregator import BtsHalf
from csipipe.methods.fedgrad import FedGrad
from csipipe.methods.seat import Seat
from csipipe.run import training
from csipipe.settings.config import DataSettings, ModelSettings, Settings
from csipipe.settings.tables import (
    METHODS,
    MODELS,
    SOURCES,
    MethodSpec,
    ModelSpec,
    SourceSpec,
)

# A method: UEs send their gradients' signs, and the BTS moves by a momentum of the mean


class FedSign(FedGrad):
    def train(self) -> tuple[Tensor, Tensor]:
        gradient, sums = super().train()
        return gradient.sign(), sums


class Momentum(BtsHalf):
    def __init__(self, seat: Seat, role: int) -> None:
        super().__init__(seat, role)
        self.velocity = torch.zeros(self.exchange.sizes[ledger.Kind.UPDATE], device=self.device)
        self.kept["momentum"] = nn.Module()
        self.kept["momentum"].register_buffer("velocity", self.velocity)

    def step(self, mean: Tensor) -> Tensor:
        self.velocity.mul_(0.9).add_(mean)
        return -1e-3 * self.velocity


prepare = partial(federated.prepare, FedSign, bts=Momentum)

# A model: two layers at the BTS


def encoder(model: ModelSettings) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(model.reals, model.c1))


def tail(model: ModelSettings) -> list[nn.Module]:
    return [nn.Linear(model.c1, model.c2 or 0), nn.Linear(model.c2 or 0, model.c2 or 0)]


def head(model: ModelSettings) -> nn.Module:
    image, reals = model.image, model.reals
    return nn.Sequential(nn.Linear(model.c2 or 0, reals), nn.Unflatten(1, image), nn.Sigmoid())


def build(angles: int, delays: int, c1: int, c2: int) -> Any:
    """The same as a user's own."""
    model = ModelSettings(angles=angles, delays=delays, c1=c1, c2=c2)
    return encoder(model), tail(model), head(model)


# A source: one strong angle per row


class OneAngle:
    padded = 1
    environments = SITES
    kind: Kind = "channel"

    def __init__(self, angles: int, delays: int) -> None:
        self.shape = (2, angles, delays)
        self.size = (angles, delays)
        self.array = (angles, 1, 1)

    def available(self, environment: Site, part: Part) -> int | None:
        return None

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        rows = np.full((stop - start, *self.shape), 0.5, np.float32)
        rows[np.arange(stop - start), 0, np.arange(start, stop) % self.shape[1], 0] = 1
        return rows

    def user_borders(self, environment: Site, part: Part) -> None:
        pass

    def identity(self, environment: Site, part: Part) -> dict[str, Any]:
        return {"angles": self.shape[1]}

    def frequency_rows(self, environment: Site, part: Part, start: int, stop: int) -> str:
        return "one angle has no frequencies"


def open_source(data: DataSettings, angles: int | None, delays: int | None) -> Source:
    return OneAngle(angles or 8, delays or 8)


class Centred(OneAngle):
    """One whose zero is another."""

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        return super().rows(environment, part, start, stop) - np.float32(1)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The three rows, for a while."""
    about = "thrown away"
    cost = "csipipe.methods.cost:shared_parts"
    parts: dict[str, Any] = {part: f"{__name__}:{part}" for part in ("encoder", "tail", "head")}
    source = SourceSpec(
        about=about,
        open=f"{__name__}:open_source",
        folder=False,
        train_samples=40,
        test_samples=12,
    )
    model = ModelSpec(about=about, partition="uniform", own_c2=True, **parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            METHODS,
            "fedsign",
            MethodSpec(
                about=about,
                prepare=f"{__name__}:prepare",
                cost=cost,
                stages=1,
                bts_steps=True,
                shared=("encoder", "tail", "head"),
            ),
        )
        patch.setitem(MODELS, "thrown-away", model)
        patch.setitem(SOURCES, "one-angle", source)
        yield


def train(world: World, settings: Settings) -> None:
    with registered():
        training.launch(world, settings)


def test_a_new_method_and_source_train_and_are_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with registered():
        settings = small(
            "fedsign",
            topology={"stages": None},
            data={"source": "one-angle", "train_samples": None, "test_samples": None},
            train={"iterations": 2},
            run={"dir": str(folder)},
        )
        run_world(2, train, settings)
        evaluate(None, str(folder), str(tmp_path / "found"), "--bits")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["status"], summary["iterations"]) == (
        "fedsign",
        "finished",
        2,
    )
    assert summary["test"]["loss"] < summary["test"]["floor_loss"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["test"]["rows"] == {"indoor": 12}
    said = capsys.readouterr().out
    assert "no ρ and SGCS: one angle has no frequencies" in said
    assert "6 bits an entry" in said
    with pytest.raises(ValueError, match="method is 'fedsign'; it must be one of csilocal"):
        small("fedsign")


@pytest.mark.parametrize("zero", [0.5, 0.0])
def test_rows_of_a_new_source_are_looked_at(zero: float, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(topology={"ues": 2})
    source: Source = OneAngle(8, 8) if zero else Centred(8, 8)
    monkeypatch.setattr(channels, "open_source", lambda *_: source)
    if zero:
        ues, test = methods.load(settings, range(2), CPU)
        assert len(ues) == 2
        assert float(test.max()) == 1
        return
    with pytest.raises(
        ValueError, match=r"source synthetic, rows of UE 0: unusable: values from -0.5"
    ):
        methods.load(settings, range(2), CPU)
    with pytest.raises(
        ValueError, match=r"source synthetic, test rows: unusable: values from -0.5 to"
    ):
        methods.load(settings, range(0), CPU)


def first_half(world: World, runs: dict[str, Settings], folder: str) -> Any:
    with registered():
        return straight(world, runs, folder)


def second_half(world: World, runs: dict[str, Settings], folder: str) -> Any:
    with registered():
        return resumed(world, runs, folder)


def test_a_new_method_goes_on_to_the_bit(tmp_path: Path) -> None:
    with registered():
        train = {"iterations": 2 * HALF}
        runs = {"": small("fedsign", topology={"stages": None}, train=train)}
        before = run_world(3, first_half, runs, str(tmp_path))
        after = run_world(5, second_half, runs, str(tmp_path))  # 4 UE ranks instead of 2
    assert "bts.momentum.velocity" in together(before, "")["state"]
    assert_same(together(before, ""), together(after, ""), *ALL)


def train_models(world: World, models: dict[str, Settings]) -> dict[str, Any]:
    with registered():
        return splits(world, models)


def test_a_new_model_is_split_as_the_unsplit_one_computes() -> None:
    with registered():
        settings = {
            name: small(model={"name": name}, topology={"partition": None})
            for name in ("thrown-away", f"{__name__}:build")
        }
        results = run_world(3, train_models, settings)
        for name, one in settings.items():
            split = joined([rank[name] for rank in results])
            whole = unsplit(one)
            assert split["losses"][-1] != split["losses"][0]
            for ours, theirs in zip(split["losses"], whole["losses"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5)
            assert split["parameters"].keys() == whole["parameters"].keys()
            for key, value in whole["parameters"].items():
                torch.testing.assert_close(split["parameters"][key], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"model\.name is 'thrown-away'; it must be one of csilocal"
    ):
        ModelSettings(name="thrown-away")
