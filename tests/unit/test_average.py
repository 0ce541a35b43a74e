"""The mean of the weights: by hand, shown only while it is evaluated or saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trainedruns
from runs import CPU, small

from csipipe import methods
from csipipe.methods.average import Averaged
from csipipe.methods.centralised import Centralised
from csipipe.run import trained
from csipipe.settings.config import Settings, TopologySettings, TrainSettings

DECAY = 0.3


def worker() -> Centralised:
    torch.set_num_threads(1)
    settings = small()
    ues, test = methods.load(settings, range(settings.topology.ues), CPU)
    return Centralised(settings, ues, test, CPU, shared=False)


def weights(of: Centralised) -> dict[str, torch.Tensor]:
    parts = {"tail": of.tail, **{f"ue-{ue.number}": ue.parts for ue in of.ues}}
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def test_the_mean_moves_towards_the_weights_and_changes_no_step(tmp_path: Path) -> None:
    plain, inner = worker(), worker()
    both = Averaged(inner, DECAY)
    wanted = weights(plain)
    for iteration in range(5):
        plain.train_iteration(iteration)
        inner.probe.unseen = True
        both.train_iteration(iteration)
        assert not inner.probe.unseen, "the mean sees the weights of every iteration"
        decay = min(DECAY, (1 + iteration) / (10 + iteration))
        for name, tensor in weights(plain).items():
            if tensor.is_floating_point():
                wanted[name] = wanted[name].lerp(tensor, 1 - decay)
    last = weights(plain)
    shown = both.evaluate("test")
    assert shown is not None
    assert not torch.equal(shown.sums, plain.evaluate("test").sums)
    both.save_weights(tmp_path)
    for name, tensor in weights(inner).items():  # as if nobody had looked
        assert torch.equal(tensor, last[name]), name
    for mean in both._means.values():
        mean.swap()
    for name, tensor in weights(inner).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(shown.sums, inner.evaluate("test").sums)


def test_what_starts_with_other_weights_starts_its_mean_with_them_too() -> None:
    inner, calls = worker(), list[str]()
    both = Averaged(inner, DECAY)
    unit = replace(inner.units()["ue-0"], begun=lambda: calls.append("the unit's own"))
    weights = {name: 2 * t for name, t in unit.state().items() if t.is_floating_point()}
    counters = {name: t for name, t in unit.state().items() if name not in weights}
    both._unit("ue-0", unit).begin(weights | counters)
    assert calls == ["the unit's own"]
    for name, mean in both._means["ue-0"].named_buffers():
        assert torch.equal(mean, weights[name.replace("/", ".")]), name


def test_a_run_in_progress_is_read_by_its_mean(tmp_path: Path) -> None:
    inner = trainedruns.begin(tmp_path / "run")
    both = Averaged(inner, DECAY)
    for iteration in range(2, 5):
        both.train_iteration(iteration)
    trainedruns.snapshot(tmp_path / "run", inner, 7, both.units())
    wanted = both.evaluate("test")
    assert wanted is not None
    rows, models = inner.test, trained.read(tmp_path / "run").models()
    for mean in both._means.values():
        mean.swap()
    inner.tail.eval()
    for ue, model in zip(inner.ues, models, strict=True):
        ue.train(False)
        with torch.no_grad():
            assert torch.equal(model(rows), ue.head(inner.tail(ue.encoder(rows))))


@pytest.mark.parametrize("decay", [0.0, 1.0, float("nan")])
def test_a_decay_lies_between_0_and_1(decay: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        TrainSettings(average=decay)


def test_what_ues_have_in_common_has_a_mean_where_all_take_part() -> None:
    train = TrainSettings(average=DECAY)
    all_four = Settings(method="fedavg", train=train, topology=TopologySettings(participants=4))
    assert all_four.participants == all_four.topology.ues
    with pytest.raises(ValueError, match="that takes no part has no mean"):
        replace(all_four, topology=TopologySettings(participants=3))
