"""What is no number in our own parts stops the run before the step that it would poison."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_world
from runs import CPU, small

from csipipe import checkpoint, methods
from csipipe.comm.texts import PeerFailed
from csipipe.comm.world import World
from csipipe.methods.centralised import Centralised
from csipipe.run.resuming import Start
from csipipe.run.training import run
from csipipe.settings.config import Settings
from csipipe.tracking import RankTracker, Tracker

NAN = math.nan


def poison(worker: Any, where: str, value: float) -> list[torch.nn.Parameter]:
    """From now on a gradient of one layer is `value`; or a weight that no gradient shows.

    Returns:
        Weights of the poisoned part; none on a rank that doesn't have it.
    """
    [half] = getattr(worker, "halves", [worker])
    parts: dict[str, Any] = {"tail": getattr(half, "layers", getattr(half, "tail", None))}
    for ue in getattr(half, "ues", []):
        if ue.number == 1 or isinstance(worker, Centralised):
            parts |= {"encoder": ue.encoder, "head": ue.head}
            break
    for replica in getattr(half, "replicas", {}).values():
        if replica.ue.number == 1:
            parts = dict(replica.parts)
    part, _, what = where.partition(".")
    if parts.get(part) is None:
        return []
    weights = list(parts[part].parameters())
    weight = weights[-1]
    if what == "gradient":
        weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value))
    else:
        with torch.no_grad():
            weight[0] = value
    return weights


def poisoned(
    world: World, settings: Settings, where: str, value: float, folder: str
) -> tuple[str, bool]:
    """The error of a rank that trains for 2 sound iterations, then another; and if the poisoned
    part stayed as it was.
    """
    build = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker: Any = build(world)
    train = worker.train_iteration
    weights: list[torch.nn.Parameter] = []
    before: list[torch.Tensor] = []

    def iteration(k: int) -> Any:
        if k == 2:
            weights.extend(poison(worker, where, value))
            before.extend(p.detach().nan_to_num(7.0) for p in weights)
        return train(k)

    worker.train_iteration = iteration
    start = Start(Path(folder))
    tracker = Tracker(start.folder, settings, 0) if world.rank == 0 else None
    last = settings.train.iterations
    mine = RankTracker(start.folder, world.role(world.rank), worker, last, 0, draws=False)
    try:
        run(worker, settings, start, tracker, mine, world)
    except FloatingPointError as error:
        world.store.set("failure", str(error))  # or who waits at a checkpoint wouldn't know
        same = all(torch.equal(a.nan_to_num(7.0), b) for a, b in zip(weights, before, strict=True))
        return str(error), bool(weights) and same
    except (ConnectionError, PeerFailed):  # whoever waits for the rank that stopped
        return "", True
    raise AssertionError("the run went on")


@pytest.mark.parametrize(
    ("method", "where", "value", "message"),
    [
        ("csilocal", "tail.gradient", NAN, r"gradient of the tail's \S+ holds nan in 1 of"),
        pytest.param(
            *(
                "csilocal",
                "encoder.gradient",
                math.inf,
                r"gradient of UE 1's encoder\.\S+ holds inf in",
            ),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(
                "csilocal",
                "head.weight",
                NAN,
                r"loss of UE 1 is nan \(head\.\S*bias isn't finite\)",
            ),
            marks=pytest.mark.long,
        ),
        ("fedavg", "tail.gradient", NAN, r"gradient of UE 1's tail \S+ holds nan in 1 of"),
        pytest.param(
            *("fedgrad", "head.weight", NAN, r"loss of UE 1 is nan \(head\.\S*bias isn't finite\)"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("fedproxper", "encoder.gradient", NAN, r"gradient of UE 1's encoder\.\S+ holds nan"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("centralised", "tail.gradient", NAN, r"gradient of the tail's \S+ holds nan in 1 of"),
            marks=pytest.mark.long,
        ),
        ("centralised", "head.gradient", 3e19, r"gradient of UE 0's head\.\S+ holds values up to"),
        ("centralised", "head.weight", NAN, r"loss of UE 0 is nan \(head\.\S*bias isn't finite\)"),
    ],
)
def test_a_poisoned_step_is_not_taken_or_saved(
    method: str, where: str, value: float, message: str, tmp_path: Path
) -> None:
    ranks = {"csilocal": 4, "centralised": 1}.get(method, 3)
    settings = small(
        method,
        topology={"stages": {"csilocal": 2, "centralised": None}.get(method, 1)},
        run={"save_every": 1, "eval_every": 10, "timeout": 20.0},
    )
    ended = run_world(ranks, poisoned, settings, where, value, str(tmp_path))
    errors = [error for error, _ in ended if error]
    assert errors
    for error in errors:  # each stage has a piece of the tail
        assert re.search(message, error)
        assert "before the optimiser's step" in error
    assert all(same for _, same in ended)
    # every iteration is saved and gets its name after the next: nothing else was written
    assert checkpoint.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "1"
    assert not (tmp_path / "weights").exists()
