"""What the end of a run says, whatever has become of its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, small
from torch.distributed import FileStore  # type: ignore[attr-defined]

from csipipe import methods
from csipipe.comm.ledger import Kind, Ledger
from csipipe.comm.world import World
from csipipe.measure.figures import Figures
from csipipe.methods.centralised import Centralised
from csipipe.run import summary
from csipipe.settings.config import Settings
from csipipe.tracking import Tracker, exchanged_summary
from csipipe.tracking.tables import closing_table


def _pca(nmse_db: float) -> dict[str, Any]:
    return {"components": 16, "bound": True, "rows": 72, "nmse_db": nmse_db}


def finished(nmse_db: float = -1.0) -> dict[str, Any]:
    """A summary, but for who is evaluated: of 4 UEs, 0 and 3 have figures."""
    nothing = {unit: {"up": 0, "down": 0} for unit in ("scalars", "bytes")}
    row = {"loss": 1e-3, "nmse_db": nmse_db}
    return {
        **{"status": "finished", "iterations": 1, "seconds_per_iteration": 1, "seconds_total": 1},
        **{"exchanged": nothing, "exchanged_buffers": nothing, "dropped": [], "joined": []},
        **{"ceiling": None, "topology": {"ues": 4}, "test_iteration": 1},
        "test": {**row, "floor_loss": 2e-3, "per_ue": [{**row, "ue": ue} for ue in (0, 3)]},
    }


def test_the_closing_table_says_over_whom_its_mean_is(tmp_path: Path) -> None:
    ended = finished()
    text = closing_table({**ended, "evaluated_ues": [0, 3]}, small(), tmp_path)
    assert "evaluated are 2 of the 4 UEs (run.eval_ues)" in text
    assert "for bad values" not in text
    text = closing_table({**ended, "evaluated_ues": [0, 1, 2, 3]}, small(), tmp_path)
    assert "the mean is without UEs 1, 2, for bad values (train.on_bad_ue)" in text
    assert "run.eval_ues" not in text
    assert "the last evaluation" not in text
    assert "buffers" not in text


def test_what_batchnorm_exchanges_is_shown_in_both_ways_together(tmp_path: Path) -> None:
    buffers = {"scalars": {"up": 3, "down": 4}, "bytes": {"up": 12, "down": 16}}
    ended = {**finished(), "evaluated_ues": [0, 3], "exchanged_buffers": buffers}
    [line] = [x for x in closing_table(ended, small(), tmp_path).splitlines() if "buffers" in x]
    assert line.split()[:3] == ["buffers", "7", "28"]


_START = "more iterations, or --model.start pca --train.lr 1e-4"


@pytest.mark.parametrize(
    ("nmse_db", "settings", "more", "said"),
    [
        (-0.6, small(), {}, None),
        (-0.01, small(), {}, f"hardly better than the floor: {_START}"),
        (3.0, small(), {}, f"no better than the floor: {_START}"),
        (-0.01, small(), {"status": "stopped"}, None),
        (-0.01, small(), {"ceiling": _pca(-15.6)}, f"hardly better than the floor: {_START}"),
        (-0.01, small(), {"ceiling": _pca(-0.4)}, None),
        (-0.01, small("fedavg"), {}, "hardly better than the floor: more iterations"),
        (
            -0.01,
            small(model={"name": "linear"}),
            {},
            "hardly better than the floor: more iterations",
        ),
        (-0.01, small(train={"init": "run"}), {}, "hardly better than the floor: more iterations"),
        (3.0, small(model={"start": "pca"}), {}, "no better than the floor: a lower --train.lr"),
        (3.0, small(data={"kind": "eigenvectors"}), {}, None),
    ],
)
def test_a_run_that_has_hardly_learnt_is_told_what_helps(
    nmse_db: float, settings: Settings, more: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    ended = {**finished(nmse_db), "evaluated_ues": [0, 3], **more}
    notes = [line.strip() for line in closing_table(ended, settings, tmp_path).splitlines()]
    assert [line for line in notes if "better than the floor" in line] == ([said] if said else [])


@pytest.mark.parametrize(
    ("training_db", "settings", "said"),
    [
        (-3.4, small(), _START),
        (-3.6, small(), "training rows at -3.6 dB, too few per UE or unlike the test set's; more "),
        (-35.7, small(model={"start": "pca"}), "training rows at -35.7 dB, too few per UE or un"),
        (
            -35.7,
            small("fedavg"),
            "training rows at -35.7 dB, too few or unlike the test set's; more rows, or --",
        ),
        (-35.7, small(train={"augment": "phase"}), "training rows at -35.7 dB, too few per UE or "),
    ],
)
def test_a_run_that_has_learnt_its_rows_by_heart_is_told_so(
    training_db: float, settings: Settings, said: str, tmp_path: Path
) -> None:
    """Also where PCA of so few rows does no better on the test set."""
    of_few = None if said == _START else _pca(-0.1)
    ended = {**finished(-0.45), "evaluated_ues": [0, 3], "ceiling": of_few}
    [note] = [
        line.strip()
        for line in closing_table(ended, settings, tmp_path, training_db).splitlines()
        if "better than the floor" in line
    ]
    assert note.startswith(f"hardly better than the floor: {said}")
    assert settings.train.augment is None or "--train.augment" not in note


@pytest.mark.parametrize(("training_db", "said"), [(-11.9, False), (-12.1, True)])
def test_so_is_one_that_has_learnt_more_besides(
    training_db: float, said: bool, tmp_path: Path
) -> None:
    ended = {**finished(-9.0), "evaluated_ues": [0, 3], "ceiling": _pca(-15.6)}
    lines = closing_table(ended, small(), tmp_path, training_db).splitlines()
    notes = [line.strip() for line in lines if "training rows at" in line]
    assert [note.startswith("training rows at -12.1 dB, too few per UE or") for note in notes] == (
        [True] if said else []
    )


def test_the_last_iteration_tells_whether_rows_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, small(), 0)
    for done, nmse in ((1, 1.0), (2, 0.01)):
        sums = torch.tensor([[8, 8e-3, 8 * nmse, 8e-3, 0]] * 4, dtype=torch.float64)
        tracker.iteration(done, Figures(sums), lr=1e-3, seconds=0.1)
    tracker.finish({**finished(-0.1), "evaluated_ues": [0, 3]})
    assert "hardly better than the floor: training rows at -20.0 dB" in capsys.readouterr().out


def test_a_stopped_run_says_of_which_iteration_its_figures_are(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = small("centralised", topology={"stages": None}, train={"iterations": 9})
    worker = Centralised(settings, *methods.load(settings, range(4), CPU), CPU)
    tracker, ledger = Tracker(tmp_path, settings, 0), Ledger(4)
    tracker.evaluation(2, worker.evaluate("test"), None, ledger)
    found = summary.content(worker, settings, tracker, ledger, 4, 1, None)
    assert (found["iterations"], found["test_iteration"]) == (4, 2)
    assert "after iteration 2: the last evaluation\n" in closing_table(found, settings, tmp_path)


def test_what_was_exchanged_is_counted_by_phase_kind_and_direction() -> None:
    ledger = Ledger(2)
    for ledger.phase, times in (("training", 1), ("evaluation", 7)):
        for n, kind in enumerate((Kind.SMASHED, Kind.OUTPUT, Kind.STATISTICS)):
            ledger.count(kind, range(2), times * 10 * 2**n, times * 40 * 2**n)
    assert exchanged_summary(ledger) == {
        "exchanged": {"scalars": {"up": 10, "down": 20}, "bytes": {"up": 40, "down": 80}},
        "exchanged_buffers": {"scalars": {"up": 40, "down": 0}, "bytes": {"up": 160, "down": 0}},
        "exchanged_evaluation": {
            "scalars": {"up": 70, "down": 140},
            "bytes": {"up": 280, "down": 560},
        },
    }


@pytest.mark.parametrize("there", [True, False])
def test_a_run_whose_data_is_gone_is_finished_all_the_same(there: bool, tmp_path: Path) -> None:
    settings = small(topology={"stages": 1}, data={"train_samples": 400}).on(1)
    if not there:
        data = replace(settings.data, source="csinet", path=str(tmp_path / "gone"))
        settings = replace(settings, data=data)
    world = World(FileStore(str(tmp_path / "store"), 1), 0, 1, 0, 1)
    found = summary.pca(settings, world)
    assert (found is not None) == there
