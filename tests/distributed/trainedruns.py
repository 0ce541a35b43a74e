"""Directories of runs that took a moment, trained in this process, as a real run leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from runs import CPU, small

from csipipe import checkpoint, methods
from csipipe.channels import deal, manifest_of, open_source
from csipipe.methods.centralised import Centralised
from csipipe.methods.replica import Replica
from csipipe.methods.state import Unit
from csipipe.settings import commandline
from csipipe.settings.config import Settings

STEPS = 2


def finish(folder: Path, method: str = "csilocal", **sections: Any) -> Centralised:
    """A finished run: `config.yaml`, `manifest.json`, `weights/`, `summary.json`; its worker."""
    worker = begin(folder, method, **sections)
    end(folder, worker)
    return worker


def begin(folder: Path, method: str = "csilocal", **sections: Any) -> Centralised:
    """A run that has trained a little and written nothing yet that lasts."""
    torch.set_num_threads(1)
    sections["train"] = {"threads": 1} | sections.get("train", {})
    settings = small(method, **sections)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(commandline.to_yaml(settings))
    data, model = settings.data, settings.model
    source = open_source(data, model.angles, model.delays)
    dealt = deal(data, settings.topology.ues, source.available)
    manifest_of(dealt, data.holdout, source).write(folder)
    ues, test = methods.load(settings, range(settings.topology.ues), CPU)
    worker = Centralised(settings, ues, test, CPU, shared=is_one_model(settings))
    for step in range(STEPS):
        worker.train_iteration(step)
    return worker


def end(folder: Path, worker: Centralised, status: str = "finished", done: int = 10) -> None:
    """What the end of a run adds."""
    worker.save_weights(folder / "weights")
    (folder / "summary.json").write_text(json.dumps({"status": status, "iterations": done}))


def snapshot(
    folder: Path, worker: Centralised, done: int, units: dict[str, Unit] | None = None
) -> Path:
    """A checkpoint of the run as it is: of the parts that its method has, or of `units`."""
    partial = folder / "checkpoints" / f"{done}.partial"
    if units is None:
        units = replicas(worker) if worker.settings.spec.shared else worker.units()
    states = {n: {k: t.contiguous() for k, t in unit.state().items()} for n, unit in units.items()}
    parts = {n: checkpoint.write_part(partial, n, state) for n, state in states.items()}
    return checkpoint.commit(partial, {"iteration": done}, parts)


def replicas(worker: Centralised) -> dict[str, Unit]:
    """The units of a federated run whose UEs have the worker's parts."""
    units = {}
    for ue in worker.ues:
        replica = Replica(ue, worker.settings, CPU)
        replica.tail.load_state_dict(worker.tail.state_dict())
        units[f"ue-{ue.number}"] = replica.unit({})
    return units


def is_one_model(settings: Settings) -> bool:
    """Whether all UEs have the same weights."""
    return settings.method == "centralised" or len(settings.spec.shared) == 3
