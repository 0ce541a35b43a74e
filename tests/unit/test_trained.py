"""Weights out of a run's directory: which ones, of every method, and what can be wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import trainedruns
from bits import assert_same
from runs import CPU

from csipipe import checkpoint
from csipipe.methods.centralised import Centralised
from csipipe.methods.state import BTS, NoMoments, Unit
from csipipe.run import trained


def reconstructions(worker: Centralised) -> list[torch.Tensor]:
    """What every UE's parts of a worker make of the test set."""
    worker.tail.eval()
    for ue in worker.ues:
        ue.train(False)
    with torch.no_grad():
        return [ue.head(worker.tail(ue.encoder(worker.test))) for ue in worker.ues]


def assert_is(run: trained.Trained, worker: Centralised) -> None:
    """The models on disk are the worker's, to the bit, and trained ones."""
    wanted = reconstructions(worker)
    with torch.no_grad():
        found = [model(worker.test) for model in run.models()]
    assert_same(found, wanted)


@pytest.mark.parametrize("method", ["csilocal", "centralised", "fedavg", "fedavgper"])
def test_a_run_is_read_from_weights_and_from_a_checkpoint(method: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    worker = trainedruns.begin(folder, method)
    trainedruns.snapshot(folder, worker, 7)
    run = trained.read(folder)
    assert (run.iteration, run.status) == (7, "unfinished")
    assert run.state == "iteration 7 of 10, run unfinished"
    assert_is(run, worker)
    one = method in ("centralised", "fedavg")
    assert len(set(run.models())) == (1 if one else 4)
    worker.train_iteration(8)
    trainedruns.end(folder, worker)
    run = trained.read(folder)
    assert run.state == "iteration 10 of 10, run finished"
    assert_is(run, worker)
    assert len(set(run.models())) == (1 if one else 4)


def test_a_run_that_went_on_after_a_stop_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    worker = trainedruns.begin(folder)
    trainedruns.end(folder, worker, "stopped", 4)
    assert trained.read(folder).state == "iteration 4 of 10, run stopped"
    (folder / "summary.json").unlink()  # as a run does that goes on
    worker.train_iteration(4)
    trainedruns.snapshot(folder, worker, 5)
    half = trainedruns.snapshot(folder, worker, 6)
    (half / "manifest.json").unlink()
    run = trained.read(folder)
    assert run.iteration == 5
    assert_is(run, worker)


def test_what_federated_ues_have_in_common_is_the_bts_of_a_checkpoint(tmp_path: Path) -> None:
    """A UE that took no part for a while is behind in its own part of it."""
    folder = tmp_path / "run"
    worker = trainedruns.begin(folder, "fedavg")
    units = trainedruns.replicas(worker)
    behind = {n: {k: t.clone() for k, t in unit.state().items()} for n, unit in units.items()}
    worker.train_iteration(5)
    modules = {"encoder": worker.ues[0].encoder, "tail": worker.tail, "head": worker.ues[0].head}
    states = behind | {BTS: Unit(modules, NoMoments()).state()}
    partial = folder / "checkpoints" / "6.partial"
    parts = {n: checkpoint.write_part(partial, n, state) for n, state in states.items()}
    checkpoint.commit(partial, {"iteration": 6}, parts)
    assert_is(trained.read(folder), worker)


def test_a_person_may_choose_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    worker = trainedruns.begin(folder)
    wanted = {}
    for step in (3, 4):
        trainedruns.snapshot(folder, worker, step)
        wanted[str(step)] = reconstructions(worker)[1]
        worker.train_iteration(step)
    for _ in range(2):  # a resumed run may find its best iteration again
        worker.save_weights(folder / "checkpoints" / "best-5.partial")
        checkpoint.switch(
            folder / "checkpoints" / "best-5.partial", folder / "checkpoints" / "best"
        )
    wanted["best"] = reconstructions(worker)[1]
    worker.train_iteration(5)
    trainedruns.end(folder, worker)
    wanted["last"] = reconstructions(worker)[1]
    for name, h_hat in wanted.items():
        [model] = trained.read(folder, weights=name).models([1])
        with torch.no_grad():
            assert torch.equal(model(worker.test), h_hat), name
    best = folder / "checkpoints" / "best"
    assert trained.read(folder, weights="best").state == "iteration 5 of 10, run finished"
    best.resolve().rename(folder / "kept")
    best.unlink()
    (folder / "kept").rename(best)  # as a copy that follows links leaves it
    assert trained.read(folder, weights="best").state == "best, run finished"
    with pytest.raises(ValueError, match=r"no such checkpoint; it has \[3, 4\]"):
        trained.read(folder, weights="5")
    with pytest.raises(ValueError, match="no such checkpoint"):
        trained.read(folder, weights="newest")


def test_weights_without_a_summary_are_read_and_said(tmp_path: Path) -> None:
    worker = trainedruns.finish(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    run = trained.read(tmp_path / "run")
    assert run.state == "weights, run of unknown state"
    assert_is(run, worker)


def test_what_can_be_wrong_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="is not a run's directory"):
        trained.read(folder)
    worker = trainedruns.begin(folder)
    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        trained.read(folder)
    with pytest.raises(ValueError, match="has no best weights"):
        trained.read(folder, weights="best")
    trainedruns.end(folder, worker)
    changes = ["--model.c1", "8", "--model.c2", "null", "--model.kernels_by", "torch"]
    differs = (
        "run was trained as another model: model.c1 is 8, but the run has 24; "
        r"model.c2 is null, but the run has 16\. Leave out what"
    )
    with pytest.raises(ValueError, match=differs):
        trained.read(folder, changes).models()
    with pytest.raises(ValueError, match=r"^unrecognized arguments: --data\.bogus"):
        trained.read(folder, ["--data.bogus", "8"])
    theirs = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"{theirs}older: 8\n")
    with pytest.raises(ValueError, match=r"run/config\.yaml: Option 'older' is not accepted"):
        trained.read(folder)
    (folder / "config.yaml").write_text(theirs)
    file = folder / "weights" / "ue-2.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    trained.read(folder).models([0])
    with pytest.raises(ValueError, match=r"ue-2\.safetensors holds no readable weights"):
        trained.read(folder).models()
    (folder / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json can't be read"):
        trained.read(folder)


def test_a_checkpoint_that_was_altered_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    newest = trainedruns.snapshot(folder, trainedruns.begin(folder), 7)
    file = newest / "ue-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"ue-1\.safetensors was altered"):
        trained.read(folder).models()
    shutil.rmtree(newest)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trained.read(folder)


def test_models_are_in_evaluation_mode(tmp_path: Path) -> None:
    trainedruns.finish(tmp_path / "run")
    for model in trained.read(tmp_path / "run").models():
        assert not any(module.training for module in model.modules())
        assert all(p.device == CPU for p in model.parameters())


def test_a_run_of_a_gpu_is_read_where_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainedruns.end(folder, trainedruns.begin(folder))
    config = folder / "config.yaml"
    there = config.read_text().replace("device: auto", "device: cuda")
    assert there != config.read_text()
    config.write_text(there)
    assert trained.read(folder).settings.train.device == "auto"
    assert trained.read(folder, ["--train.device", "cpu"]).settings.train.device == "cpu"
