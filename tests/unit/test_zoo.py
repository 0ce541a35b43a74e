"""The weights that come with the repository are what their cards say, and small."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import CPU

from csipipe import channels, methods
from csipipe.export.parts import nmse_db
from csipipe.export.parts import run as through
from csipipe.methods.centralised import Centralised
from csipipe.run import card, initial, trained
from csipipe.settings import commandline

ZOO = Path(__file__).parents[2] / "weights"
MOST = 10_000_000  # bytes of a file
each = pytest.mark.parametrize(
    "folder", sorted(f.parent for f in ZOO.glob("*/card.json")), ids=lambda folder: folder.name
)


@each
def test_weights_can_be_used_as_a_run_can(folder: Path) -> None:
    run = trained.read(folder)  # compares every file with its digest
    assert all(file.stat().st_size <= MOST for file in folder.rglob("*") if file.is_file())
    assert f"| `{folder.name}` |" in (ZOO / "README.md").read_text()
    few = replace(run.settings, data=replace(run.settings.data, test_samples=200))
    rows = torch.from_numpy(channels.rows_of(*channels.tested(few)))
    [told] = json.loads((folder / card.CARD).read_text())["figures"]["nmse_db"]
    assert nmse_db(through(run.models()[0], rows), rows) == pytest.approx(told, abs=1)


@each
def test_a_run_goes_on_from_them(folder: Path) -> None:
    torch.set_num_threads(1)
    changes = [f"--train.init={folder}", "--data.train_samples=20", "--data.test_samples=10"]
    changes += ["--train.batch_size=10", "--train.lr=1e-6", "--model.kernels_by=torch"]
    settings = commandline.read(["--config", str(folder / "config.yaml"), *changes])
    ues, test = methods.load(settings, range(1), CPU)
    worker = Centralised(settings, ues, test, CPU, shared=False)
    source = initial.read(settings)
    assert source is not None
    source.give(worker)
    for name, tensor in source.source.ue_weights(0).items():
        assert torch.equal(worker.ues[0].parts.state_dict()[name], tensor), name
    figures = worker.train_iteration(0)
    assert math.isfinite(figures.loss)


def test_there_are_some() -> None:
    assert list(ZOO.glob("*/card.json"))
