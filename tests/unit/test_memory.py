"""Memory of a UE is what its tensors take."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from csipipe.comm.codec import Residual
from csipipe.comm.ledger import Kind
from csipipe.methods import memory
from csipipe.methods.average import Mean
from csipipe.methods.common import sizes
from csipipe.methods.fedavg import FedAvg
from csipipe.methods.fedgrad import FedGrad
from csipipe.methods.replica import Agreed, Replica
from csipipe.methods.ue import UserEquipment
from csipipe.settings.config import (
    ModelSettings,
    Moments,
    Settings,
    TopologySettings,
    TrainSettings,
)

CPU = torch.device("cpu")
REPLICAS: dict[str, type[Replica]] = {
    "csilocal": Replica,
    "fedavg": FedAvg,
    "fedproxper": FedAvg,
    "fedgrad": FedGrad,
    "fedgradper": FedGrad,
}


def setting(method: str, moments: Moments = "fp32", participants: int | None = None) -> Settings:
    return Settings(
        method=method,
        model=ModelSettings(c1=24, c2=16, angles=8, delays=8, kernels_by="torch"),
        topology=TopologySettings(ues=4, participants=participants),
        train=TrainSettings(batch_size=8, moments=moments),
    )


def size(tensors: list[Tensor]) -> int:
    """Bytes of tensors of numbers, each once."""
    return sum(t.nbytes for t in {id(t): t for t in tensors if t.is_floating_point()}.values())


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("method", REPLICAS)
def test_it_is_what_the_tensors_of_a_ue_take(method: str, moments: Moments) -> None:
    settings = setting(method, moments)
    rows = np.random.default_rng(0).random((16, 2, 8, 8), dtype=np.float32)
    ue = UserEquipment(0, settings, rows, rows[:0], CPU)
    parts: list[nn.Module] = [ue.encoder, ue.head]
    agreed: list[Agreed] = []
    step = partial(ue.optimizer.step)
    if settings.spec.shared:
        replica = REPLICAS[method](ue, settings, CPU)
        parts.append(replica.tail)
        agreed = replica.agreed
        replica.start(0)
        step = replica.train  # type: ignore[assignment]
    else:
        for parameter in ue.parts.parameters():
            parameter.grad = torch.zeros_like(parameter)
    step()
    weights = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    held = memory.of_a_ue(settings)
    assert held["weights"] == size([*weights, *(one.value for one in agreed)])
    states = [state for state in ue.optimizer.state.values() if state]
    assert held["moments"] == size([s[k] for s in states for k in ("exp_avg", "exp_avg_sq")])
    assert [held[key] for key in ("mean", "feedback", "bts")] == [0, 0, 0]
    averaged = replace(settings, train=replace(settings.train, average=0.9))
    mean = Mean({**ue.parts, **({"tail": parts[2]} if len(parts) > 2 else {})})
    assert memory.of_a_ue(averaged) == held | {"mean": size([*mean.buffers()])}
    assert f"{size([*mean.buffers()]) / 2**20:.2f} of the weights' mean" in memory.note(averaged)


@pytest.mark.parametrize("method", ["csilocal", "fedavgper"])
def test_layers_that_a_model_itself_freezes_take_memory(method: str) -> None:
    plain = setting(method)
    model = replace(plain.model, name="frozenmodel:build")
    settings = replace(plain, model=model, train=replace(plain.train, average=0.9))
    rows = np.zeros((1, 2, 8, 8), np.float32)
    ue = UserEquipment(0, settings, rows, rows[:0], CPU)
    parts, agreed = dict(ue.parts), list[Agreed]()
    if settings.spec.shared:
        replica = FedAvg(ue, settings, CPU)
        parts, agreed = replica.parts, replica.agreed
    weights = [t for part in parts.values() for t in (*part.parameters(), *part.buffers())]
    held = memory.of_a_ue(settings)
    assert held["weights"] == size([*weights, *(one.value for one in agreed)])
    assert held["mean"] == size([*Mean(parts).buffers()])


def test_ranges_of_the_codeword_are_weights_that_dont_move() -> None:
    plain = setting("csilocal")
    codec = replace(plain.comm.codec, smashed="int4")
    settings = replace(plain, comm=replace(plain.comm, codec=codec, scale="range"))
    rows = np.zeros((1, 2, 8, 8), np.float32)
    ue = UserEquipment(0, settings, rows, rows[:0], CPU)
    held = memory.of_a_ue(settings)
    assert held["weights"] == size([*ue.parts.parameters(), *ue.parts.buffers()])
    assert held["moments"] == memory.of_a_ue(plain)["moments"]


def test_what_updates_lose_is_kept_where_it_is_made_up_for() -> None:
    plain = setting("fedavg")
    codec = replace(plain.comm.codec, update="int4")
    made_up = replace(plain, comm=replace(plain.comm, codec=codec, error_feedback=True))
    residual = Residual(sizes(made_up)[Kind.UPDATE])
    assert memory.of_a_ue(made_up) == memory.of_a_ue(plain) | {"feedback": residual.value.nbytes}
    assert "of what updates lost; " in memory.note(made_up)


def test_the_bts_keeps_what_an_absent_ue_knows() -> None:
    held = memory.of_a_ue(setting("fedavg", participants=2))
    assert held["bts"] == held["weights"] / 2
    assert memory.of_a_ue(setting("csilocal", participants=2))["bts"] == 0
    assert "of what it knows; " in memory.note(setting("fedavg", participants=2))
    assert "moments (bf16); " in memory.note(setting("csilocal", "bf16"))
