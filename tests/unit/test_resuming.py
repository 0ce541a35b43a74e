"""How a run begins: anew, from a checkpoint of its own or of another, or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from storedruns import run_in, snapshot

from csipipe import checkpoint
from csipipe.comm.world import World
from csipipe.run.folder import claim, reopen
from csipipe.run.resuming import Start, decide, in_words
from csipipe.settings.config import RunSettings, Settings, TopologySettings, TrainSettings


def test_where_a_run_is_computed_may_change(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_in(folder, Settings())
    source = snapshot(folder / "checkpoints", 7)
    moved = Settings(
        topology=TopologySettings(stages=1, partition="uniform"),
        train=TrainSettings(threads=3, schedule="gpipe", device="cpu"),
        run=RunSettings(timeout=5.0, save_every=3, keep=9),
    )
    assert decide(moved, folder, again=False).checkpoint == source


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(train=TrainSettings(lr=1e-3)), "train.lr 0.002, this run has 0.001"),
        (Settings(train=TrainSettings(seed=1)), "train.seed 0, this run has 1"),
        (Settings(run=RunSettings(eval_ues=2)), "run.eval_ues null, this run has 2"),
        (Settings(topology=TopologySettings(ues=5)), "topology.ues 4, this run has 5"),
        (Settings(train=TrainSettings(iterations=600)), "cosine depend on it"),
    ],
)
def test_what_is_computed_may_not(settings: Settings, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_in(folder, Settings())
    with pytest.raises(ValueError, match=message):
        decide(settings, folder, again=False)


@pytest.mark.parametrize(
    ("participants", "personal", "done", "longer", "first"),
    [
        (None, 5, 25, 60, None),  # 20 of 25 iterations with averagings: as in a run of 60
        (None, 5, 30, 60, 30),
        (None, 0, 30, 45, None),
        (None, 5, 30, 32, None),
        (2, 5, 20, 60, None),
        (2, 5, 21, 60, 21),  # those who had been absent had come back
    ],
)
def test_averagings_of_a_longer_run_are_those_that_were(
    participants: int | None,
    personal: int,
    done: int,
    longer: int,
    first: int | None,
    tmp_path: Path,
) -> None:
    """SplitFed averages after every 10 iterations, and in the last `personal` ones never.

    Args:
        first: iteration that would have been another, counted from 1.
    """
    settings = Settings(
        method="splitfed",
        topology=TopologySettings(participants=participants),
        train=TrainSettings(
            iterations=30, personal_iterations=personal, lr_schedule="constant", aggregate_every=10
        ),
    )
    folder = tmp_path / "run"
    run_in(folder, settings)
    source = snapshot(folder / "checkpoints", done, settings)
    settings = replace(settings, train=replace(settings.train, iterations=longer))
    if first is None:
        assert decide(settings, folder, again=False).checkpoint == source
        return
    message = rf"iterations 30, this run has {longer}: in iteration {first}, .*run\.resume"
    with pytest.raises(ValueError, match=message):
        decide(settings, folder, again=False)


ZERO = {"gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}


def with_file(file: Path, content: dict[str, Any], **topology: Any) -> Settings:
    """Settings with a DeepSpeed file of that content."""
    file.write_text(json.dumps(content))
    return Settings(train=TrainSettings(deepspeed=str(file)), topology=TopologySettings(**topology))


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ({"stages": 1}, r"topology\.stages 2, this run has 1: with ZeRO stage 1"),
        ({"partition": "uniform"}, r"partition type:CRBlock, this run has uniform: with ZeRO"),
    ],
)
def test_under_zero_the_tail_stays_cut_as_it_is(
    topology: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = with_file(tmp_path / "zero.json", ZERO)
    folder = tmp_path / "run"
    run_in(folder, settings)
    source = snapshot(folder / "checkpoints", 7, settings)
    same = with_file(tmp_path / "zero.json", ZERO, stages=2)  # what null stands for
    assert decide(same, folder, again=False).checkpoint == source
    with pytest.raises(ValueError, match=message):
        decide(with_file(tmp_path / "zero.json", ZERO, **topology), folder, again=False)


def test_a_deepspeed_file_is_what_it_holds(tmp_path: Path) -> None:
    settings = with_file(tmp_path / "one.json", ZERO)
    folder = tmp_path / "run"
    run_in(folder, settings)
    source = snapshot(folder / "checkpoints", 7, settings)
    moved = with_file(tmp_path / "two.json", ZERO)
    assert decide(moved, folder, again=False).checkpoint == source
    edited = with_file(tmp_path / "one.json", {"gradient_clipping": 0.0})
    with pytest.raises(ValueError, match=r'zero_optimization \{"stage": 1\} in the file of'):
        decide(edited, folder, again=False)


def test_a_finished_run_of_another_deepspeed_file_is_not_this_one(tmp_path: Path) -> None:
    settings = with_file(tmp_path / "one.json", ZERO)
    folder = tmp_path / "run"
    run_in(folder, settings)
    (folder / "summary.json").write_text('{"status": "finished", "iterations": 500}')
    assert decide(settings, folder, again=False).finished
    with pytest.raises(ValueError, match=r"was made with train\.deepspeed"):
        decide(with_file(tmp_path / "two.json", ZERO), folder, again=False)


def test_fewer_iterations_than_there_are_is_refused(tmp_path: Path) -> None:
    given = [
        Settings(train=TrainSettings(iterations=n, lr_schedule="constant")) for n in (10, 20, 7, 5)
    ]
    folder = tmp_path / "run"
    run_in(folder, given[0])
    source = snapshot(folder / "checkpoints", 7, given[0])
    for longer in given[1:3]:  # or as long: what is left to write is the summary
        assert decide(longer, folder, again=False).checkpoint == source
    with pytest.raises(ValueError, match=r"is from iteration 7, but train\.iterations is 5"):
        decide(given[3], folder, again=False)


def test_a_restart_goes_on_whatever_was_asked(tmp_path: Path) -> None:
    settings = Settings(run=RunSettings(resume="never"))
    folder = tmp_path / "run"
    run_in(folder, settings)
    with pytest.raises(ValueError, match="already holds a run"):
        decide(settings, folder, again=False)
    assert decide(settings, folder, again=True).exists


def begun_elsewhere(tmp_path: Path) -> tuple[Settings, Path, Path]:
    """Settings, folder and source of a run that was killed before it had saved anything."""
    source = tmp_path / "source"
    run_in(source, Settings())
    first = snapshot(source / "checkpoints", 7)
    settings = Settings(run=RunSettings(resume=str(source)))
    folder = tmp_path / "run"
    assert decide(settings, folder, again=False) == Start(folder, first)
    run_in(folder, settings)
    return settings, folder, first


def test_a_run_begun_elsewhere_begins_there_again(tmp_path: Path) -> None:
    settings, folder, first = begun_elsewhere(tmp_path)
    wanted = Start(folder, first, exists=True)
    assert decide(settings, folder, again=True) == wanted  # restarted by torchrun
    assert decide(settings, folder, again=False) == wanted  # requeued by SLURM, or by hand
    assert decide(Settings(), folder, again=False) == wanted  # by hand, without run.resume


def test_a_run_begun_elsewhere_goes_on_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder, first = begun_elsewhere(tmp_path)
    mine = Start(folder, snapshot(folder / "checkpoints", 9), exists=True)
    monkeypatch.chdir(tmp_path)
    for resume in (str(settings.run.resume), "source", "auto"):
        named = Settings(run=RunSettings(resume=resume))
        assert decide(named, folder, again=False) == mine
    checkpoint.discard(first)  # its own are enough
    assert decide(settings, folder, again=False) == mine
    snapshot(tmp_path / "third" / "checkpoints", 5)
    with pytest.raises(ValueError, match="belongs to another; choose a new"):
        decide(Settings(run=RunSettings(resume="third")), folder, again=False)


def test_a_source_that_vanished_is_named(tmp_path: Path) -> None:
    settings, folder, first = begun_elsewhere(tmp_path)
    checkpoint.discard(first)
    for again in (True, False):
        with pytest.raises(
            ValueError, match=f"started from run.resume {settings.run.resume}, which"
        ):
            decide(settings, folder, again=again)


def test_a_run_that_goes_on_remembers_where_it_was_begun(tmp_path: Path) -> None:
    settings, folder, first = begun_elsewhere(tmp_path)
    plain = Settings()
    reopen(decide(plain, folder, again=False), plain)
    assert decide(plain, folder, again=False).checkpoint == first
    assert decide(settings, folder, again=False).checkpoint == first


def test_a_requeued_job_does_not_go_back_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_in(folder, Settings())
    first = snapshot(folder / "checkpoints", 5)
    back = Settings(run=RunSettings(resume=str(first)))
    begun = decide(back, folder, again=False)
    assert in_words(begun, back) == f"resuming after iteration 5, from {first}"
    reopen(begun, back)
    later = snapshot(folder / "checkpoints", 9)
    checkpoint.discard(first)  # run.keep
    found = decide(back, folder, again=False)
    assert found.checkpoint == later
    said = f"run.resume {first} took it back before and doesn't again"
    assert f"iteration 9, from {later}. {said}" in in_words(found, back)
    (folder / "summary.json").write_text('{"status": "finished", "iterations": 500}')
    ended = decide(back, folder, again=False)
    assert f"is finished: nothing to do. {said}" in in_words(ended, back)
    assert in_words(decide(Settings(), folder, again=False), Settings()).endswith("nothing to do.")


def test_what_a_run_that_went_back_saves_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_in(folder, Settings())
    places = {n: snapshot(folder / "checkpoints", n) for n in (50, 100, 150)}
    back = Settings(run=RunSettings(resume=str(places[50])))
    reopen(decide(back, folder, again=False), back)
    assert "removed checkpoint(s) 100, 150" in capsys.readouterr().out
    for iteration in (60, 70):
        snapshot(folder / "checkpoints", iteration)
        checkpoint.prune(folder / "checkpoints", keep=2)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["60", "70"]


def test_going_on_from_the_newest_removes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_in(folder, Settings())
    places = [snapshot(folder / "checkpoints", n) for n in (50, 100)]
    reopen(decide(Settings(), folder, again=False), Settings())
    assert capsys.readouterr().out == ""
    assert all((place / "manifest.json").is_file() for place in places)


@pytest.mark.parametrize(("taken", "kept"), [(4, True), (5, True), (6, False), (20, False)])
def test_the_best_weights_of_a_run_are_none_of_what_comes_later(
    taken: int, kept: bool, tmp_path: Path
) -> None:
    """In the run's directory, and in that of a run which resumes from it; of iteration 5."""
    folder = tmp_path / "run"
    run_in(folder, Settings())
    first, best = snapshot(folder / "checkpoints", 5), folder / "checkpoints" / "best"
    partial = folder / "checkpoints" / f"best-{taken}.partial"
    partial.mkdir()
    (partial / "file").write_text("")
    checkpoint.switch(partial, best)
    other = Settings(run=RunSettings(dir=str(tmp_path / "other"), resume=str(first)))
    _, held = claim(decide(other, tmp_path / "other", again=False), other, World.alone())
    held.release()
    mine = Settings(run=RunSettings(resume=str(first)))
    reopen(decide(mine, folder, again=False), mine)
    for found in (tmp_path / "other" / "checkpoints" / "best", best):
        assert (found / "file").exists() == found.is_symlink() == kept
    assert len(list(best.parent.glob("best*"))) == 2 * kept
