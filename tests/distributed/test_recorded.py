"""An iteration that is recorded once and replayed, as a CUDA graph does it.

A CPU has no such graphs. `Tape` keeps what a GPU's keeps (operations with the tensors that they
had, and nothing that Python decides) and refuses what a GPU's refuses: to read a value on the host.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_world
from runs import CPU, small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from csipipe import checkpoint, methods
from csipipe.comm import trust
from csipipe.comm.ledger import Kind, Ledger
from csipipe.comm.trust import BadMessage
from csipipe.comm.world import World
from csipipe.methods import recorded
from csipipe.methods.csilocal_ue import UeHalf
from csipipe.run import stopping, training
from csipipe.run.resuming import Start
from csipipe.settings.config import Settings
from csipipe.tracking import RankTracker, Tracker

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
}
ONE = {"stages": 1, "placement": "together"}


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations, to be done again with the same tensors.

    Args:
        host: tensors that lie on the host beside a GPU too, so that a graph knows nothing of them.
    """

    def __init__(self, host: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.host = {_place(tensor) for tensor in host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func}: a graph can't wait for a value"
        out = func(*args, **(kwargs or {}))
        if not self.host & {_place(tensor) for tensor in _tensors(args)}:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.calls:
                now = func(*args, **kwargs)
                for old, new in zip(_tensors(before), _tensors(now), strict=True):
                    if _place(old) != _place(new):
                        old.copy_(new)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def taped(host: list[Tensor], compute: Callable[[], None]) -> Callable[[], None]:
    """As `recorded.record`; a tape does what it records, so its first replay is left out."""
    tape = Tape(host)
    with tape:
        compute()
    plays = iter([lambda: None])
    return lambda: next(plays, tape.play)()


def rates_as_on_a_gpu(worker: Any) -> None:
    """Tensors, which a tape sees change."""
    for half in worker.halves:
        optimizers = [ue.optimizer for ue in getattr(half, "ues", [])] or [half.stage.optimizer]
        for group in (group for one in optimizers for group in one.param_groups):
            group["lr"] = torch.zeros(())


def trained(world: World, settings: Settings, way: str) -> dict[str, Any]:
    """Ten iterations, every figure, and the state; an evaluation in between."""
    build = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker: Any = build(world)
    rates_as_on_a_gpu(worker)
    if way != "computed":
        worker.record(partial(taped, [half.wire.ledger.counts for half in worker.halves]))
    found: dict[str, Any] = {"sums": []}
    for k in range(10):
        worker.probe.gradients_wanted = k == 6  # somebody looks at it
        worker.probe.unseen = way.startswith("ahead") and k not in (1, 5, 9)
        found["sums"].append(worker.train_iteration(k).sums.clone())
        if k in (1, 5):
            found["sums"].append(worker.evaluate("test").sums.clone())
    found["norms"] = worker.probe.norms()
    found["ledger"] = worker.exchanged().counts.clone()
    if way.endswith("spoiled"):
        worker.probe.unseen = way.startswith("ahead")
        found["error"] = spoiled(worker)
    found["state"] = {
        f"{name} {key}": tensor.clone()
        for name, unit in worker.units().items()
        for key, tensor in unit.state().items()
    }
    world.leave()
    return found


def spoiled(worker: Any) -> str:
    """An iteration in which UE 2 sends NaN: the error, and not a scalar changed or counted."""
    (half,) = (half for half in worker.halves if isinstance(half, UeHalf))
    generators = [ue.generator.get_state() for ue in half.ues]
    mine, next_ones = (half.ues[2].draw(worker.settings.train.batch_size)[0] for _ in range(2))
    bad = next(row for row in mine.tolist() if row not in next_ones)
    half.ues[2].rows[int(bad)] = float("nan")
    half.ues[2].generator.set_state(generators[2])
    with pytest.raises(BadMessage) as error:
        worker.train_iteration(10)
    for ue, generator in zip(half.ues, generators, strict=True):
        ue.generator.set_state(generator)
    return str(error.value)


def whole_run(world: World, settings: Settings, folder: str, record: bool, asked: int) -> list[int]:
    """A run with all that may happen between iterations; which of them were launched ahead.

    Args:
        asked: during this iteration the run is asked to stop.
    """
    world.connect(20.0)
    worker: Any = methods.prepare(settings, 0, 1, CPU)(world)
    rank = getattr(worker, "worker", worker)
    rates_as_on_a_gpu(rank)
    ahead: list[int] = []
    if record:
        rank.record(partial(taped, [half.wire.ledger.counts for half in rank.halves]))
    launch, begin = rank._launch, rank.halves[0].begin

    def noted(iteration: int, as_it_is: bool) -> None:
        if rank._ahead:
            ahead.append(iteration + 1)
        launch(iteration, as_it_is)

    def begun(iteration: int) -> None:
        if iteration + 1 == asked:
            (Path(folder) / stopping.STOP_FILE).touch()
        begin(iteration)

    rank._launch, rank.halves[0].begin = noted, begun
    stopping._LOOK = 0.0
    worker.probe.apart = 3
    start = Start(Path(folder))
    mine = RankTracker(start.folder, world.role(0), worker, 12, 0, draws=True)
    training.run(worker, settings, start, Tracker(start.folder, settings, 0), mine, world)
    world.leave()
    return ahead


def frozen(world: World, settings: Settings) -> int:
    """Five iterations of a run in which UEs learn nothing."""
    build = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker: Any = build(world)
    rates_as_on_a_gpu(worker)
    verdicts: list[int] = []

    def counted(compute: Callable[[], None]) -> Callable[[], None]:
        replay = taped([half.wire.ledger.counts for half in worker.halves], compute)
        verdicts.append(1)
        return replay

    worker.record(counted)
    for k in range(5):
        worker.train_iteration(k)
    world.leave()
    return len(verdicts)


def test_frozen_ends_are_recorded() -> None:
    settings = small(topology=ONE, train={"freeze": "encoder,head"})
    assert run_world(1, frozen, settings) == [1]


def test_nothing_is_judged_where_there_is_no_gradient() -> None:
    """A number would lie on the host, beside those of a GPU."""
    with trust.postponed() as later:
        trust.check_gradients("nobody's", nn.Linear(2, 2).named_parameters())
    assert not later.numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_postponed_is_judged_at_the_end(bad: float) -> None:
    """Nothing steps if a check doesn't hold, nor in the iteration after it."""
    rows, stepped = torch.ones(2, 3), []
    each = [rows.clone(), torch.zeros(2, 1)]
    each[0][1, 2] = bad
    assert trust.each_finite(each) == [True, False]
    sound = torch.ones((), dtype=torch.bool)
    for tensors in ([rows, each[1]], each, [rows]):
        with trust.postponed() as later:
            assert trust.sound(rows, 1.0)
            assert trust.each_finite(tensors) == [True, True]
            trust.if_sound(lambda bad: stepped.append(None if bad is None else float(bad)))
        assert len(stepped) < 3
        later.finish(sound)
    assert stepped == [0.0, 1.0, 1.0]
    with trust.postponed() as later:
        assert trust.sound(rows, 0.99)
    sound.fill_(True)
    later.finish(sound)
    assert not sound


@pytest.fixture(scope="module", params=["never", "always"])
def runs(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    changes = {"lr": 2**-9, "augment": "angle,phase", "stacked": request.param}
    settings = small(topology=ONE, train=changes)
    ways = ("computed", "recorded", "ahead", "spoiled", "ahead, spoiled")
    return {way: run_world(1, trained, settings, way)[0] for way in ways}


@pytest.mark.parametrize("way", ["recorded", "ahead"])
def test_a_replayed_iteration_has_the_same_bits(runs: dict[str, dict[str, Any]], way: str) -> None:
    one, two = runs["computed"], runs[way]
    assert len(one["sums"]) == 12
    for k, (mine, other) in enumerate(zip(one["sums"], two["sums"], strict=True)):
        assert torch.equal(mine, other), k
    assert torch.equal(one["ledger"], two["ledger"])
    assert one["norms"] == two["norms"]
    assert {"encoder", "tail", "head"} <= one["norms"].keys()
    assert one["state"].keys() == two["state"].keys()
    for name, tensor in one["state"].items():
        assert torch.equal(tensor, two["state"][name]), name


LOOKED_AT = {"eval_every": 4, "save_every": 5}


@pytest.mark.parametrize(
    ("train", "run", "asked", "wanted", "last"),
    [
        ({}, LOOKED_AT, 0, [7, 8, 10], 12),
        ({"average": 0.9}, LOOKED_AT, 0, [], 12),
        ({}, {"eval_every": 12, "save_every": 12}, 6, [5, 7], 7),
    ],
    ids=["looked at", "averaged", "stopped"],
)
def test_a_run_goes_ahead_where_nobody_looks(
    tmp_path: Path,
    train: dict[str, Any],
    run: dict[str, int],
    asked: int,
    wanted: list[int],
    last: int,
) -> None:
    """Not before an evaluation or a checkpoint, nor to an iteration whose gradients are shown."""
    settings = small(topology=ONE, train=train | {"iterations": 12}, run=run)
    ahead = [
        run_world(1, whole_run, settings, str(tmp_path / name), record, asked)[0]
        for name, record in (("computed", False), ("recorded", True))
    ]
    assert ahead == [[], wanted]
    runs = [tmp_path / name / "checkpoints" / f"{last}" for name in ("computed", "recorded")]
    one, two = (checkpoint.Snapshot(folder).content for folder in runs)
    assert one["parts"] == two["parts"]  # their digests
    files = [folder.parents[1] / "history.jsonl" for folder in runs if not asked]
    history = [file.read_text().splitlines() for file in files]
    assert all(len(lines) == 3 for lines in history)
    tests = [[json.loads(line)["test"] for line in lines] for lines in history]
    assert tests[:1] == tests[1:]


@pytest.mark.parametrize("way", ["spoiled", "ahead, spoiled"])
def test_a_bad_value_is_named_and_nothing_has_changed(
    runs: dict[str, dict[str, Any]], way: str
) -> None:
    assert "from UE 2" in runs[way]["error"]
    assert "holds nan" in runs[way]["error"]
    before, after = runs["recorded"]["state"], runs[way]["state"]
    # the encoders' statistics have seen the mini-batch, as in a run without a recording
    changed = {n for n, tensor in before.items() if not torch.equal(tensor, after[n])}
    assert all(" encoder." in n and ("running" in n or "tracked" in n) for n in changed), changed


def test_what_the_recorder_refuses_has_a_remedy() -> None:
    def refuse(compute: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    recording = recorded.Recorded(list, [], refuse, CPU)
    for _ in range(3):
        recording.launch(lambda: None, as_it_is=False)
    with pytest.raises(ValueError, match=r"\(operation .* capturing\); use train.cuda_graph never"):
        recording.launch(lambda: None, as_it_is=False)


def test_a_full_memory_is_named_as_one() -> None:
    """Though PyTorch can't end the recording then, and says so on top."""

    def refuse(compute: Callable[[], None]) -> Callable[[], None]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("capture was invalidated")

    recording = recorded.Recorded(list, [], refuse, CPU)
    for _ in range(3):
        recording.launch(lambda: None, as_it_is=False)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        recording.launch(lambda: None, as_it_is=False)


def test_a_replay_that_is_wrong_alone_ends_the_run_with_the_state_of_before() -> None:
    value, sent, ledger = torch.zeros(3), torch.ones(3), Ledger(1)

    def compute() -> None:
        value.add_(1)
        ledger.count(Kind.SMASHED, [0], 5, 20)
        assert trust.sound(sent, 1e4)

    def wrong(compute: Callable[[], None]) -> Callable[[], None]:
        sent.fill_(math.nan)
        compute()

        def replay() -> None:
            value.mul_(100)
            sent.fill_(1.0)

        return replay

    recording = recorded.Recorded(lambda: [value], [ledger], wrong, CPU)
    for _ in range(3):
        recording.launch(compute, as_it_is=False)
        recording.settle(compute)
    for _ in range(2):  # the second one before the first one's checks are read
        recording.launch(compute, as_it_is=False)
    with pytest.raises(FloatingPointError, match=r"use train\.cuda_graph never"):
        recording.settle(compute)
    assert value.tolist() == [4.0] * 3  # three iterations, and the one that was computed again
    assert ledger.total("training", [Kind.SMASHED]) == (20, 80)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "computes on a CPU"),
        ({"train": {"on_bad_ue": "drop"}}, "drop decides"),
        ({"topology": ONE | {"participants": 2}}, "other UEs take part"),
        ({"method": "splitfed", "train": {"aggregate_every": 2}}, "averaged between"),
        ({"model": {"name": "randommodel:build"}}, "draws random numbers"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split()[0],
)
def test_what_cannot_be_recorded_is_said(changes: dict[str, Any], why: str) -> None:
    assert why in run_world(1, reason, small(**({"topology": ONE} | changes)))[0]


def reason(world: World, settings: Settings) -> str:
    """Why this run isn't recorded: the device's reason comes first, then those of the roles."""
    build = methods.prepare(settings, world.rank, world.size, CPU)
    world.ready("data")
    world.connect(20.0)
    worker: Any = build(world)
    found = [worker._unrecordable(), *(half.unrecordable() for half in worker.halves)]
    world.leave()
    return "; ".join(filter(None, found))
