"""Benchmarks without processes: who takes part, comparison, tables."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from csipipe import models
from csipipe.bench import candidates, command, growth, memory, plain, race, rank, roofline, table
from csipipe.bench.conductor import Turn
from csipipe.bench.rank import END, Order
from csipipe.measure.clock import Clock
from csipipe.pipeline.schedule import bubble
from csipipe.settings.config import ModelSettings, Settings, TopologySettings, TrainSettings


def turn(
    seconds: float, spent: dict[str, float] | None = None, peak: int | None = None, ranks: int = 4
) -> Turn:
    shares = [{} if spent is None else spent] * ranks
    return Turn(seconds, [[0.1]], shares, [10**8] * ranks, [peak] * ranks)


def finished(**seconds: list[float]) -> race.Race:
    """A race with those seconds per round of `ours`, `deepspeed`, …"""
    found = candidates.line_up(Settings(), 2, list(seconds), ("ours",))
    rounds = [
        {name: turn(value) for name, value in zip(seconds, values, strict=True)}
        for values in zip(*seconds.values(), strict=True)
    ]
    return race.Race(found, rounds=rounds, beside={"deepspeed": 0.0})


def test_candidates_have_the_same_cores_rows_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "cores", lambda: 16)
    settings = Settings(
        topology=TopologySettings(ues=6, stages=3), train=TrainSettings(batch_size=40)
    )
    found = {
        c.label: c
        for c in candidates.line_up(settings, 2, candidates.choose(None), candidates.LAYERS)
    }
    assert len(found) == 12
    assert [found["ours"].ranks, found["ours"].threads] == [5, 3]
    assert found["ours"].settings.data.train_samples == 240
    assert found["ours"].settings.data.holdout == 0
    assert [found["ours-unpipelined"].ranks, found["ours-unpipelined"].settings.stages] == [3, 1]
    assert found["deepspeed (plain)"].layers == "plain"
    assert found["deepspeed"].settings == found["torch-1f1b"].settings == found["ours"].settings
    assert [found["one-process"].ranks, found["one-process"].threads] == [1, 15]
    assert found["one-piece"].settings.train.micro_batches == 1
    assert found["ours"].roles == ["stage 0", "stage 1", "stage 2", "UE rank 3", "UE rank 4"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="--only names 'stock'"):
        candidates.choose("ours,stock")
    with pytest.raises(ValueError, match=r"--ue-ranks is 5.*between 1 and topology\.ues \(4\)"):
        candidates.line_up(Settings(), 5, ["ours"], ("ours",))
    with pytest.raises(ValueError, match="method is centralised"):
        candidates.line_up(Settings(method="centralised"), 1, ["ours"], ("ours",))


def test_help_names_the_usual_candidates() -> None:
    [only] = [a for a in command.parser()._actions if "--only" in a.option_strings]
    assert str(only.help).endswith(f"null: {','.join(candidates.choose(None))}")


def test_torch_compile_takes_part_on_request_and_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert candidates.COMPILED not in candidates.choose(None)
    monkeypatch.setenv("CXX", sys.executable)  # some program
    names = candidates.choose("ours,one-compiled")
    _, compiled = candidates.line_up(Settings(), 2, names, candidates.LAYERS)
    assert [compiled.label, compiled.layers, compiled.ranks] == ["one-compiled", "plain", 1]
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler.* no /nowhere/c\+\+ here"):
        candidates.choose("ours,one-compiled")


def test_plain_layers_compute_the_same() -> None:
    model = ModelSettings(c1=12, c2=10, angles=16, delays=8)
    ours, theirs = (
        nn.Sequential(*build(model, 3)) for build in (models.build_tail, plain.build_tail)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    z = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    outputs, gradients = [], []
    for tail in (ours, theirs):
        x = z.clone().requires_grad_()
        outputs.append(tail(x))
        outputs[-1].square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in tail.parameters())])
    torch.testing.assert_close(outputs[0], outputs[1])
    for a, b in zip(*gradients, strict=True):  # kernels sum in another order
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)  # running statistics


def test_a_turn_is_measured_per_iteration_without_the_untimed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, done, times = Clock(), list[int](), iter([10.0, 16.0])

    def iterate(iteration: int) -> SimpleNamespace:
        done.append(iteration)
        clock.seconds["compute"] += 1.5
        return SimpleNamespace(loss_per_ue=[float(iteration)])

    trainer: Any = SimpleNamespace(clock=clock, train_iteration=iterate)
    monkeypatch.setattr(rank, "dist", SimpleNamespace(barrier=lambda: None))
    monkeypatch.setattr(rank, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    found = rank._take_turn(trainer, 4, Order(3, untimed=2), torch.device("cpu"))
    assert done == [4, 5, 6, 7, 8]
    assert found == {
        "seconds": 2.0,
        "losses": [[4.0], [5.0], [6.0], [7.0], [8.0]],
        "spent": {"compute": 1.5, "send": 0.0, "wait": 0.0},
    }


def test_losses_are_compared_ue_by_ue_over_the_first_iterations() -> None:
    wanted = [[1.0, 2.0]] * race.COMPARED
    found = [[1.0, 2.0]] * (race.COMPARED - 1) + [[1.0, 2.002]]
    assert race.difference(found, wanted) == pytest.approx(1e-3)
    assert race.difference(wanted, wanted) == 0.0
    assert race.difference([*wanted, [5.0, 5.0]], [*wanted, [1.0, 1.0]]) == 0.0
    assert race.difference([[1.0, float("nan")]], [[1.0, 2.0]]) == float("inf")
    assert race.difference([[1e-9]], [[0.0]]) == float("inf")


def test_ratios_are_taken_round_by_round() -> None:
    contest = finished(ours=[1.0, 3.0, 2.0], deepspeed=[2.0, 4.0, 2.0])
    assert contest.ratios("ours", "deepspeed") == [0.5, 0.75, 1.0]
    lines = table.ratio_table(contest).splitlines()
    assert lines[1].split() == ["deepspeed", "0.750", "0.625", "…", "0.875", "0.500", "1.000"]
    lines = table.seconds_table(contest).splitlines()
    assert lines[1].split()[:4] == ["ours", "1.000", "2.000", "3.000"]
    assert lines[2].endswith("the same, to the bit")


class Asleep:
    """A candidate that computes nothing; `orders` are those of all."""

    def __init__(self, label: str, loss: float, orders: list[tuple[str, Order]]) -> None:
        self.label, self.loss, self.orders = label, loss, orders
        self.ended = False

    def turn(self, order: Order) -> Turn:
        self.orders.append((self.label, order))
        return Turn(1.0, [[self.loss]], [{}], [0], [2**30])

    def end(self, patience: float) -> None:
        self.ended = True


def asleep(**losses: float) -> tuple[race.Race, dict[str, Asleep], list[tuple[str, Order]]]:
    """A race of candidates with those losses, and the orders that they get."""
    contest = race.Race(candidates.line_up(Settings(), 2, list(losses), ("ours",)))
    orders: list[tuple[str, Order]] = []
    residents = {label: Asleep(label, loss, orders) for label, loss in losses.items()}
    contest._residents.update(residents)  # type: ignore[arg-type]  # no processes
    return contest, residents, orders


def test_nobody_always_follows_the_same_candidate() -> None:
    contest, _, orders = asleep(ours=1, deepspeed=1, **{"torch-1f1b": 1})
    for _ in range(3):
        contest.round()
    firsts = [label for label, _ in orders[::3]]
    assert firsts == ["ours", "deepspeed", "torch-1f1b"]


@pytest.mark.parametrize(("gib", "crowded"), [(3.01, False), (2.99, True), (None, False)])
def test_where_memory_is_short_each_returns_its_own_and_settles_again(
    gib: float | None, crowded: bool
) -> None:
    contest, _, orders = asleep(ours=1, deepspeed=1)  # a GiB each, and one must stay free
    contest.warm_up(None if gib is None else int(gib * 2**30))
    assert contest.crowded == crowded
    orders.clear()
    contest.round()
    assert {order for _, order in orders} == {Order(1, untimed=2 * crowded, release=crowded)}


def test_whoever_computes_something_else_is_ended_and_not_timed() -> None:
    contest, residents, _ = asleep(ours=1, deepspeed=1 + 0.9e-4, **{"torch-1f1b": 1})
    contest.round()
    assert not contest.failures
    contest.losses["torch-1f1b"] = [[1 + 1.1e-4]]
    contest.round()
    assert list(contest.failures) == ["torch-1f1b"]
    assert residents["torch-1f1b"].ended
    assert [sorted(turns) for turns in contest.rounds] == [["deepspeed", "ours"]] * 2


def test_a_round_without_a_failed_candidate_counts_for_the_others() -> None:
    contest = finished(ours=[1.0, 3.0], deepspeed=[2.0, 4.0])
    contest.rounds[1].pop("deepspeed")
    assert contest.ratios("ours", "deepspeed") == [0.5]
    assert contest.seconds == {"ours": [1.0, 3.0], "deepspeed": [2.0]}


def test_shares_of_time_stand_beside_the_bubble() -> None:
    contest = finished(ours=[2.0])
    assert table.share_table(contest, contest.candidates[0]) == ""  # no clock is kept
    contest.rounds = [{"ours": turn(2.0, {"compute": 1.0, "send": 0.1, "wait": 0.8})}]
    lines = table.share_table(contest, contest.candidates[0]).splitlines()
    assert lines[1].split() == ["stage", "0", "50.0%", "5.0%", "40.0%"]
    assert len(lines) == 6
    assert "20.0%" in lines[5]  # 2 stages, 4 micro-batches
    assert bubble(1, 7) == 0


def test_quartiles() -> None:
    assert table.spread([3.0]) == dict.fromkeys(("min", "q1", "median", "q3", "max"), 3.0)
    assert list(table.spread([5.0, 1.0, 2.0, 4.0, 3.0]).values()) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_growth_keeps_the_rows_of_a_micro_batch() -> None:
    settings = Settings(train=TrainSettings(batch_size=64, micro_batches=4))
    found = growth.candidates(settings, 2)
    for n, candidate in zip(growth.UES, found, strict=True):
        grown = candidate.settings
        assert grown.topology.ues == n
        assert n * grown.train.batch_size // grown.train.micro_batches == 64
    with pytest.raises(ValueError, match=r"64 UEs need train\.micro_batches 4 × 64/4"):
        growth.candidates(Settings(), 2)


def test_growth_is_shown_beside_four_ues() -> None:
    settings = Settings(train=TrainSettings(batch_size=64, micro_batches=4))
    found = growth.candidates(settings, 2, ues=(4, 8))
    peak = 150_000_000
    rounds = [{"4 UEs": turn(0.256, peak=peak), "8 UEs": turn(0.768, peak=peak)}] * 2
    line = growth.table(race.Race(found, rounds=rounds)).splitlines()[-1]
    wanted = "8 UEs 8 11.1% 1.500 1.500 1.500 1.50 150 (+50), 150 (+50)"
    assert line.split() == wanted.split()


def test_orders_cross_the_store_as_text() -> None:
    order = Order(3, untimed=1, release=True)
    assert Order.read(order.write()) == order
    assert Order.read(END) is None


def test_what_a_container_leaves_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available()
    assert whole is not None
    monkeypatch.setattr(memory, "_LIMIT", tmp_path)
    (tmp_path / "memory.current").write_text("400\n")
    for most, wanted in (("1000", 600), (str(2**60), None), ("max", None)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        found = memory.available()
        assert found is not None
        assert found == wanted if wanted else found > 1e6


def test_the_peak_of_memory_starts_anew() -> None:
    before = memory.peak()
    if before is None:
        pytest.skip("this system doesn't tell")
    block = torch.ones(50_000_000)
    high = memory.peak()
    del block
    memory.release()
    memory.forget_peak()
    low, room = memory.peak(), memory.available()
    assert high is not None
    assert low is not None
    assert low < high - 100_000_000
    assert room is not None
    assert room > 0


def test_others_are_compared_with_the_first_that_is_left() -> None:
    contest = finished(ours=[1.0])
    assert contest.reference == "ours"
    contest.failures["ours"] = "gone"
    assert contest.reference is None
    assert replace(contest, failures={}).reference == "ours"


def test_work_is_that_of_all_passes() -> None:
    model = ModelSettings(c1=3, c2=5, angles=4, delays=6)
    work = roofline.of_layers(models.build_tail(model, 0), torch.zeros(1, 3))
    products = 2 * 7 * 9 + 2 * 7 * 7 * 9 + 2 * 7 * 5 + 7 * 7 * 5 + 14 * 2
    assert [w.flop for w in work] == [
        3 * 2 * n for n in (3 * 48, 0, 2 * 2 * 9 * 24, 0, products * 24, products * 24, 0, 48 * 5)
    ]
    assert work[0].bytes == 3 * 4 * (3 + 48)
    assert work[1].bytes == 0
    assert work[3].bytes == 3 * 4 * (48 + 48)


def test_ranks_share_the_work_of_one_process() -> None:
    settings = Settings(
        model=ModelSettings(angles=32, delays=32),
        topology=TopologySettings(ues=5),
        train=TrainSettings(batch_size=8),
    )
    found = candidates.line_up(settings, 2, ["ours", "ours-together", "one-process"], ("ours",))
    ours, together, one = (
        sum((roofline.of_rank(c, [0, 5, 8], rank) for rank in range(c.ranks)), roofline.Work())
        for c in found
    )
    assert ours == together == one
    assert one.flop > 0


def test_what_ranks_reach_stands_beside_the_machines_peaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contest = finished(ours=[2.0, 4.0], deepspeed=[1.0, 1.0])
    contest.parts["ours"] = [0, 5, 8]
    model = ModelSettings(angles=32, delays=32)
    contest.candidates = [
        replace(c, settings=replace(c.settings, model=model)) for c in contest.candidates
    ]
    for turns in contest.rounds:
        compute = {"compute": turns["ours"].seconds / 2}
        turns["ours"] = replace(turns["ours"], spent=[compute] * 4)
    monkeypatch.setattr(roofline, "_fastest", lambda run: 2.0)  # seconds
    found = roofline.measure(contest)
    assert list(found) == ["ours"]  # the other has no clock
    stage = found["ours"]["ranks"]["stage 0"]
    assert stage["seconds"] == 1.5
    assert stage["gflops"] == pytest.approx(stage["gflop"] / 1.5)
    work = roofline.of_rank(contest.candidates[0], [0, 5, 8], 0)
    assert stage["gbytes"] == pytest.approx(1e-9 * work.bytes / 1.5)
    assert found["ours"]["peak_gflops"] == pytest.approx(1e-9 * 2 * 1024**3 / 2)
    # 64 MiB are read and written
    assert found["ours"]["peak_gbytes"] == pytest.approx(1e-9 * 2 * 2**26 / 2)
    lines = roofline.table(found).splitlines()
    assert len(lines) == 7
    share = stage["gflops"] / found["ours"]["peak_gflops"]
    assert lines[2].split()[:4] == ["stage", "0", f"{stage['gflops']:.1f}", f"{share:.0%}"]
    assert roofline.table({}) == ""
