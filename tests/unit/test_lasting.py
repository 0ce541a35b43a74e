"""Snapshots, locks and what may change when a run goes on: no processes but one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from csipipe import checkpoint
from csipipe.comm.world import World
from csipipe.methods.state import NoMoments, Unit
from csipipe.pipeline import settings as deepspeed
from csipipe.pipeline.zero import ZeroMoments
from csipipe.run import lock, slurm
from csipipe.run.folder import anywhere, claim, new_folder, reopen
from csipipe.run.resuming import DEEPSPEED, Start, decide, in_words
from csipipe.settings import commandline
from csipipe.settings.config import (
    DataSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TopologySettings,
    TrainSettings,
)
from csipipe.tracking.tables import closing_table


def snapshot(checkpoints: Path, iteration: int, settings: Settings | None = None) -> Path:
    """A snapshot with one part."""
    partial = checkpoints / f"{iteration}.partial"
    record = checkpoint.write_part(partial, "ue-0", {"x": torch.arange(5.0)})
    settings = settings or Settings()
    content = {
        "iteration": iteration,
        "settings": commandline.plain(settings),
        DEEPSPEED: deepspeed.of(settings),
    }
    return checkpoint.commit(partial, content, {"ue-0": record})


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


def run_in(folder: Path, settings: Settings) -> None:
    """What a run of `settings` leaves that was killed."""
    folder.mkdir()
    (folder / "config.yaml").write_text(commandline.to_yaml(settings))


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


HOLD = "import sys; from pathlib import Path; from csipipe.run.lock import Lock; " + (
    "held = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by a live run .process {holder.pid} on"):
            lock.check(tmp_path)
        with pytest.raises(ValueError, match="in use"):
            lock.Lock(tmp_path)
        holder.kill()
        holder.wait()
    lock.check(tmp_path)
    lock.Lock(tmp_path).release()


def test_a_lock_of_another_node_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH", 0.4)
    monkeypatch.setattr(lock, "BEAT", 0.2)
    file = tmp_path / "lock"
    file.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "now"}))
    ended = threading.Event()

    def live() -> None:
        while not ended.is_set():
            time.sleep(0.05)
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(ValueError, match="on elsewhere"):
        lock.Lock(tmp_path)
    ended.set()
    thread.join()
    lock.Lock(tmp_path).release()  # it shows no life any more


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("csilocal", "fedavg-indoor"),
        ("crnet", "fedavg-crnet-indoor"),
        ("mine.models:build", "fedavg-mine.models-build-indoor"),
    ],
)
def test_a_runs_name_says_which_model_it_trains(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(method="fedavg", model=ModelSettings(name=model))
    assert re.fullmatch(rf"{name}-\d{{8}}-\d{{6}}", new_folder(settings).name)
    job = {"SLURM_JOB_ID": "12"}
    assert slurm.folder_of(settings, job) == Path(f"runs/{name}-job12")


def test_two_runs_of_one_second_get_a_directory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    name = new_folder(settings)
    one, first = claim(Start(name), settings, World.alone())
    assert one.folder == name
    # both looked before either took it, or the second a moment later
    other, second = claim(Start(name), settings, World.alone())
    assert len({name, other.folder, new_folder(settings)}) == 3
    assert (other.folder / "config.yaml").is_file()
    first.release()
    third = claim(Start(name), settings, World.alone())[1]  # held a run, which has ended
    lock.check(name)  # and is left alone
    for held in (second, third):
        held.release()
    given = replace(settings, run=RunSettings(dir=str(name)))
    with pytest.raises(ValueError, match="already holds a run"):
        claim(Start(name), given, World.alone())


def test_paths_are_kept_so_that_they_can_be_followed_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataSettings(source="csinet", path="files")
    kept = anywhere(Settings(data=data, run=RunSettings(resume="old")))
    assert (kept.data.path, kept.run.resume) == (f"{tmp_path}/files", f"{tmp_path}/old")
    assert anywhere(Settings()) == Settings()


def test_paths_are_quoted_where_they_are_to_be_typed(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    held = lock.Lock(folder)
    with pytest.raises(ValueError, match="in use") as refusal:
        lock.Lock(folder)
    held.release()
    assert f"`touch '{folder}/stop'`" in str(refusal.value)
    nothing = {unit: {"up": 0, "down": 0} for unit in ("scalars", "bytes")}
    ended = {"status": "stopped", "iterations": 1, "seconds_per_iteration": 1, "seconds_total": 1}
    found = {"test": None, "exchanged": nothing, "exchanged_buffers": nothing}
    text = closing_table({**ended, **found, "dropped": [], "joined": []}, Settings(), folder)
    assert f"--run.dir '{folder}'" in text
    assert f"tensorboard --logdir '{folder}'" in text
