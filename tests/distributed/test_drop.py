"""train.on_bad_ue drop, for CSILocal: a bad UE leaves no trace in what the others compute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, small
from torch import Tensor

from csipipe import methods
from csipipe.checkpoint import Snapshot
from csipipe.comm import trust
from csipipe.comm.world import World
from csipipe.measure.figures import Figures
from csipipe.methods import csilocal
from csipipe.methods.centralised import Centralised
from csipipe.methods.csilocal_ue import UeHalf
from csipipe.methods.rank import Rank
from csipipe.run.saving import Saver, restore
from csipipe.settings.config import Settings

NAN = math.nan
ROOT = Path(__file__).parents[2]
Bad = dict[int, tuple[str, list[int]]]
"""By UE: what it spoils (smashed, output_gradient, own gradient), in which iterations from 0."""


def spoil(worker: Rank, bad: Bad, value: float) -> None:
    """Put `value` into one scalar of the last micro-batch, or of the head's weight gradient."""
    now = -1
    train = worker.train_iteration

    def counted(iteration: int) -> Figures | None:
        nonlocal now
        now = iteration
        return train(iteration)

    worker.train_iteration = counted  # type: ignore[method-assign]
    half = worker.halves[-1]
    if not isinstance(half, UeHalf):
        return
    for place, ue in enumerate(half.ues):
        what, iterations = bad.get(ue.number, ("", []))
        if what == "own":
            check = ue.check

            def poisoned(
                loss: Tensor, ue: Any = ue, check: Any = check, when: Any = iterations
            ) -> None:
                if now in when:
                    ue.head[0].weight.grad[0, 0] = value
                check(loss)

            ue.check = poisoned  # type: ignore[method-assign]
        elif what:
            channel = {
                "smashed": half.ports.forward_out,
                "output_gradient": half.ports.backward_out,
            }[what]

            def send(
                m: int,
                tensor: torch.Tensor,
                send: Any = channel.send,
                when: Any = iterations,
                row: int = place * half.wire.rows,
            ) -> torch.Tensor:
                if now in when and m == half.wire.micro_batches - 1:
                    tensor = tensor.clone()
                    tensor[row, 1] = value
                sent: torch.Tensor = send(m, tensor)
                return sent

            channel.send = send  # type: ignore[method-assign]


def build(world: World, settings: Settings, keep: list[int]) -> Any:
    """A worker of a run with the UEs `keep` of the four that `settings` deals rows to."""
    fewer = small(
        topology={**vars(settings.topology), "ues": len(keep)},
        train={**vars(settings.train), "on_bad_ue": settings.train.on_bad_ue},
        model=vars(settings.model),
    )
    everyone, test = methods.load(settings, range(4), CPU)

    def load(_: Settings, numbers: range, device: torch.device) -> Any:
        return [everyone[keep[place]] for place in numbers], test

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csilocal, "load", load)
        builder = methods.prepare(fewer, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    return builder(world)


def train(
    world: World, settings: Settings, keep: list[int], bad: Bad, value: float = NAN
) -> dict[str, Any]:
    """One rank: losses per iteration, the state of all parts, and how often UEs were dropped."""
    worker = build(world, settings, keep)
    spoil(worker, bad, value)
    losses = []
    try:
        for k in range(settings.train.iterations):
            figures = worker.train_iteration(k)
            losses.append(figures.loss_per_ue if figures is not None else [])
        test = worker.evaluate("test")
    except trust.BadMessage as error:
        return {"error": str(error)}
    except ConnectionError:
        return {}
    world.leave()
    return {
        "losses": losses,
        "test": test.sums if test is not None else None,
        "left out": test.left_out if test is not None else None,
        "dropped": worker.dropped,
        "state": {
            f"{part}/{name}": tensor.clone()
            for part, unit in worker.units().items()
            for name, tensor in unit.state().items()
        },
    }


def setting(
    stages: int,
    schedule: str = "zerobubble",
    placement: str = "apart",
    head: str = "linear",
    **train: Any,
) -> Settings:
    return small(
        model={"head": head},
        topology={"stages": stages, "placement": placement},
        train={"iterations": 4, "on_bad_ue": "drop", "schedule": schedule, **train},
    )


def with_tail(settings: Settings, state: dict[str, Tensor]) -> Centralised:
    """The unsplit model with a trained tail, and UEs that haven't learnt."""
    torch.set_num_threads(1)
    found = Centralised(settings, *methods.load(settings, range(4), CPU), CPU, shared=False)
    for name, unit in found.units().items():
        if name.startswith("tail-"):
            prefix = f"{name}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            unit.begin(own)
    return found


def states(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: tensor for rank in ranks for name, tensor in rank["state"].items()}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("what", "value", "settings"),
    [
        ("smashed", NAN, setting(2)),
        ("output_gradient", math.inf, setting(1, deepspeed=str(ROOT / "ds_configs/zero1.json"))),
        ("output_gradient", NAN, setting(2, placement="together", head="crblock")),
        slow("smashed", NAN, setting(1, "1f1b", "together")),
        slow("output_gradient", NAN, setting(2)),
        slow("smashed", 1e30, setting(1, "gpipe")),
        slow("smashed", NAN, setting(4, "1f1b", precision="bf16")),
        slow("output_gradient", 1e30, setting(4, "gpipe")),
        slow("output_gradient", NAN, setting(3, "1f1b")),
        slow("output_gradient", NAN, setting(2, precision="bf16", micro_batches=2)),
    ],
)
def test_a_ue_that_is_dropped_leaves_no_trace(what: str, value: float, settings: Settings) -> None:
    together = settings.topology.placement == "together"
    ranks, keep = settings.stages + (0 if together else 2), [0, 2, 3]
    always = {1: (what, list(range(4)))}
    found = run_world(ranks, train, settings, [0, 1, 2, 3], always, value)
    wanted = run_world(ranks, train, settings, keep, {})
    assert found[0]["dropped"] == [0, 4, 0, 0]
    assert wanted[0]["dropped"] == [0, 0, 0]
    for ours, theirs in zip(found[0]["losses"], wanted[0]["losses"], strict=True):
        assert [ours[ue] for ue in keep] == theirs
        assert ours[1] == 0.0
    assert_same(found[0]["test"][keep], wanted[0]["test"])
    assert found[0]["left out"] == ({1} if what == "smashed" else set())  # no gradients there
    ours, theirs = states(found), states(wanted)
    if what == "output_gradient":  # it is evaluated all the same, with its parts as they began
        rtol = 1e-5 if settings.train.precision == "fp32" else 1e-2
        evaluated = with_tail(settings, ours).evaluate("test").sums[1]
        torch.testing.assert_close(found[0]["test"][1], evaluated, rtol=rtol, atol=0)
    assert len(theirs) > 100
    assert any("running_mean" in name for name in theirs)
    assert any("adam" in name for name in theirs)
    assert_same({name: ours[name] for name in theirs}, theirs)
    new = methods.load(settings, range(4), CPU)[0][1].unit().state()
    idle = {name: tensor for name, tensor in ours.items() if name.startswith("ue-1/")}
    assert {f"ue-1/{name}" for name in new} == idle.keys()  # no moments: Adam took no step
    for name, tensor in new.items():
        assert torch.equal(idle[f"ue-1/{name}"], tensor) is (name != "draws"), name


@pytest.mark.long
def test_a_ue_is_taken_back_when_it_is_sound_again() -> None:
    """Beside the unsplit model, which leaves the same UEs out of the same iteration."""
    settings = setting(2, iterations=5)
    bad: Bad = {1: ("smashed", [2]), 2: ("output_gradient", [2])}
    ranks = run_world(4, train, settings, [0, 1, 2, 3], bad)
    assert ranks[0]["dropped"] == [0, 1, 1, 0]
    torch.set_num_threads(1)
    everyone, test = methods.load(settings, range(4), CPU)
    unsplit = Centralised(settings, everyone, test, CPU, shared=False)
    for k, losses in enumerate(ranks[0]["losses"]):
        out = [1, 2] if k == 2 else []
        unsplit.ues = [ue for ue in everyone if ue.number not in out]
        for ue in out:
            everyone[ue].draw(settings.train.batch_size)
        wanted = iter(unsplit.train_iteration(k).loss_per_ue)
        for ue, loss in enumerate(losses):
            assert loss == (0.0 if ue in out else pytest.approx(next(wanted), rel=1e-5))


@pytest.mark.long
def test_a_ue_that_cannot_step_stays_as_it_was() -> None:
    """What it sent was sound: the others' step is the same as with it."""
    settings = setting(2, lr_schedule="constant", iterations=3)
    shorter = setting(2, lr_schedule="constant", iterations=2)
    everyone = [0, 1, 2, 3]
    found = run_world(4, train, settings, everyone, {1: ("own", [2])})
    assert found[0]["dropped"] == [0, 1, 0, 0]
    wanted = states(run_world(4, train, settings, everyone, {}))
    before = states(run_world(4, train, shorter, everyone, {}))
    left = {n: t for n, t in before.items() if n.startswith("ue-1/") and "draws" not in n}
    assert_same(states(found), wanted | left)


def test_a_run_without_a_sound_ue_stops() -> None:
    bad: Bad = {ue: ("smashed" if ue < 2 else "output_gradient", [1]) for ue in range(4)}
    ranks = run_world(4, train, setting(2), [0, 1, 2, 3], bad)
    assert "no sound UE is left to train with: all 4 are bad" in ranks[1]["error"]
    assert "output gradient of micro-batch 3 from UE 3" in ranks[1]["error"]


def go_on(world: World, settings: Settings, folder: str, bad: Bad) -> list[list[int]]:
    """Train with a bad UE and save; then set another worker up from what was saved."""
    worker = build(world, settings, [0, 1, 2, 3])
    spoil(worker, bad, NAN)
    for k in range(2):
        worker.train_iteration(k)
    saver = Saver(worker, settings, Path(folder), world)
    saver.begin(2, worker.exchanged(), {"best": None})
    assert saver.settle() is None
    world.ready("saved")
    before = worker.dropped
    worker.dropped = [0] * 4
    restore(worker, settings, Snapshot(Path(folder, "checkpoints", "2")))
    world.leave()
    return [before, worker.dropped]


@pytest.mark.long
def test_the_count_goes_on_with_the_run(tmp_path: Path) -> None:
    bad: Bad = {2: ("smashed", [1]), 3: ("smashed", [0, 1])}
    assert run_world(4, go_on, setting(2), str(tmp_path), bad)[0] == [[0, 0, 1, 2]] * 2
