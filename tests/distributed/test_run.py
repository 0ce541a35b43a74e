"""Whole runs, started as a user starts them: torchrun, real processes, files on disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness import Program, errors, run_program
from safetensors import safe_open
from scipy import io
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from csipipe.channels import Manifest, Span
from csipipe.channels.csinet import CsiNetSource
from csipipe.channels.synthetic import SyntheticSource

ROOT = Path(__file__).parents[2]
TINY = {
    "model.c1": "24",
    "model.c2": "16",
    "model.angles": "8",
    "model.delays": "8",
    "model.kernels_by": "torch",  # kernels take longer to compile than the run takes
    "data.train_samples": "200",
    "data.test_samples": "30",
    "train.iterations": "6",
    "train.batch_size": "8",
    "run.eval_every": "3",
}


def arguments(folder: Path, **settings: str) -> list[str]:
    """A tiny run in `folder`; `train__lr="1"` stands for --train.lr 1."""
    chosen = {**TINY, "run.dir": str(folder)}
    chosen |= {name.replace("__", "."): value for name, value in settings.items()}
    return [text for key, value in chosen.items() for text in (f"--{key}", value)]


def torchrun(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*line, "launch/train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished run: its folder, what it printed, what it logged."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = torchrun(4, arguments(folder))
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout, ended.stderr


def test_the_summary_says_what_the_interface_promises(finished: tuple[Path, str, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert (summary["method"], summary["status"], summary["iterations"]) == (
        "csilocal",
        "finished",
        6,
    )
    test = summary["test"]
    assert [row["ue"] for row in test["per_ue"]] == [0, 1, 2, 3]
    assert test["loss"] == pytest.approx(sum(row["loss"] for row in test["per_ue"]) / 4)
    linear = sum(10 ** (row["nmse_db"] / 10) for row in test["per_ue"]) / 4
    assert 10 ** (test["nmse_db"] / 10) == pytest.approx(linear)
    assert 0 < test["floor_loss"] < 1
    scalars = 6 * 4 * 8 * (24 + 16)
    assert summary["exchanged"] == {
        "scalars": {"up": scalars, "down": scalars},
        "bytes": {"up": 4 * scalars, "down": 4 * scalars},
    }
    assert summary["exchanged_evaluation"]["scalars"]["up"] > 0
    assert summary["dropped"] == [0, 0, 0, 0]
    assert summary["seconds_per_iteration"] > 0
    assert set(summary["parameters"]) == {"encoder", "tail", "head"}
    assert summary["topology"]["stages"] == 2


def test_the_config_repeats_the_run(finished: tuple[Path, str, str]) -> None:
    config = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert config["model"]["c1"] == 24
    assert config["train"]["lr_schedule"] == "cosine"  # complete, not only what was given


def test_the_manifest_says_which_rows_are_whose(finished: tuple[Path, str, str]) -> None:
    dealt = Manifest.read(finished[0])
    assert dealt.train[1] == (Span("indoor", "train", 50, 98),)
    assert dealt.holdout[1] == (Span("indoor", "train", 98, 100),)
    assert dealt.test == (Span("indoor", "test", 0, 30),)
    dealt.check(SyntheticSource(0, 8, 8))


def test_weights_are_saved_by_ue_and_by_layer(finished: tuple[Path, str, str]) -> None:
    for folder in (finished[0] / "weights", finished[0] / "checkpoints" / "best"):
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["tail.safetensors", *(f"ue-{n}.safetensors" for n in range(4))]
        with safe_open(folder / "tail.safetensors", "pt") as tail:
            assert tail.get_tensor("tail.0.weight").shape == (128, 24)
            assert tail.get_tensor("tail.7.weight").shape == (16, 128)
            assert any(name.startswith("tail.4.") for name in tail.keys())  # noqa: SIM118
        with safe_open(folder / "ue-3.safetensors", "pt") as ue:
            assert ue.get_tensor("encoder.4.weight").shape == (24, 128)
            assert ue.get_tensor("head.0.weight").shape == (128, 16)


def test_tensorboard_has_the_curves(finished: tuple[Path, str, str]) -> None:
    events = EventAccumulator(str(finished[0]))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("test/nmse_db")] == [3, 6]
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert events.Scalars("test/loss")[-1].value == pytest.approx(summary["test"]["loss"])
    assert events.Scalars("exchanged/scalars")[-1].value == 2 * 6 * 4 * 8 * (24 + 16)


def test_every_rank_has_curves_of_its_own(finished: tuple[Path, str, str]) -> None:
    shown = {}
    for folder in (finished[0] / "ranks").iterdir():
        events = EventAccumulator(str(folder))
        events.Reload()
        assert [event.step for event in events.Scalars("time/wait")] == [1, 2, 3, 4, 5, 6]
        names = {tag for tag in events.Tags()["scalars"] if tag.startswith("gradient_norm/")}
        pictures = events.Tags()["images"]
        steps = [event.step for event in events.Images("reconstruction")] if pictures else []
        shown[folder.name] = (sorted(name.removeprefix("gradient_norm/") for name in names), steps)
    ends = ["encoder", "head"]
    assert shown == {
        "bts-stage-0": (["tail", "tail_layer_0", "tail_layer_2", "tail_layer_4"], []),
        "bts-stage-1": (["tail", "tail_layer_5", "tail_layer_7"], []),
        "ue-rank-2-ues-0-1": (ends, [3, 6]),
        "ue-rank-3-ues-2-3": (ends, []),
    }


def test_the_screen_ends_with_the_table(finished: tuple[Path, str, str]) -> None:
    folder, out, err = finished
    for text in ("UE 3", "NMSE (dB)", "floor", "UE → BTS", f"tensorboard --logdir {folder}"):
        assert text in out
    pca = json.loads((folder / "summary.json").read_text())["ceiling"]
    assert (pca["components"], pca["bound"], pca["rows"]) == (16, True, 200)
    assert f"PCA-16           —  {pca['nmse_db']:>10.2f}   of 200 training rows: an estimate" in out
    assert "iteration 6/6" in err


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "launch/evaluate.py", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_evaluate_repeats_the_figures_of_the_run(
    finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    ended = evaluate(str(finished[0]), "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    test = json.loads((finished[0] / "summary.json").read_text())["test"]
    [found] = json.loads((tmp_path / "figures.json").read_text())["runs"]
    for mine, theirs in zip(
        [found["mean"], *found["per_ue"]], [test, *test["per_ue"]], strict=True
    ):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["nmse_db"] == pytest.approx(theirs["nmse_db"], abs=1e-5)


@pytest.mark.long
def test_evaluate_takes_other_data_and_refuses_what_is_no_run(
    finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    other = evaluate(
        str(finished[0]), "--data.environment", "outdoor", "--out", str(tmp_path / "o")
    )
    assert other.returncode == 0, other.stderr
    assert "outdoor (built in), 30 rows" in other.stdout
    for folder, message in (
        (tmp_path, "has no config.yaml"),
        (finished[0], "another model: model.c1 is 8"),
    ):
        ended = evaluate(str(folder), "--model.c1", "8")
        assert ended.returncode == 1
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_finished_run_is_left_alone(finished: tuple[Path, str, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    ranks = run_program(4, arguments(finished[0]))
    assert [rank.code for rank in ranks] == [0] * 4, errors(ranks)
    assert "holds this run, which is finished" in ranks[0].out
    assert before == {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}


def slow(settings: dict[str, str]) -> Any:
    return pytest.param(settings, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "settings",
    [
        slow({"data__environment": "noniid", "topology__ues": "5"}),
        {"train__precision": "bf16"},
        slow({"train__deepspeed": "ds_configs/zero1.json"}),
        {"data__holdout": "0", "data__environment": "outdoor", "train__micro_batches": "1"},
    ],
    ids=["noniid", "bf16", "zero1", "no-holdout"],
)
def test_other_settings_train_too(
    settings: dict[str, str], tmp_path: Path, finished: tuple[Path, str, str]
) -> None:
    ranks = run_program(4, arguments(tmp_path / "run", **settings))
    assert [rank.code for rank in ranks] == [0] * 4, errors(ranks)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (tmp_path / "run" / "checkpoints" / "best").exists() == ("data__holdout" not in settings)
    if "train__deepspeed" in settings:  # the same arithmetic in another place
        one = json.loads((finished[0] / "summary.json").read_text())
        assert summary["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-5)


def test_ranks_share_one_copy_of_csinets_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSIPIPE_CACHE", str(tmp_path / "cache"))
    for name, count in (("train", 160), ("val", 40), ("test", 30)):
        rows = np.random.default_rng(count).random((count, 2048), np.float32)
        io.savemat(tmp_path / f"DATA_H{name}out.mat", {"HT": rows})
    files = {"data__source": "csinet", "data__path": str(tmp_path), "data__environment": "outdoor"}
    ranks = run_program(4, arguments(tmp_path / "run", **files))
    assert [rank.code for rank in ranks] == [0] * 4, errors(ranks)
    dealt = Manifest.read(tmp_path / "run")
    assert [spans[0].size for spans in dealt.train] == [48] * 4
    dealt.check(CsiNetSource(tmp_path, 0, 8, 8))
    left = sorted(path.suffix or path.name for path in (tmp_path / "cache").iterdir())
    assert left == [".findings"] * 3 + [".json"] * 3 + [".npy"] * 3 + ["lock"]


@pytest.mark.long
def test_centralised_runs_in_one_process(tmp_path: Path) -> None:
    [rank] = run_program(1, arguments(tmp_path / "run", method="centralised"))
    assert rank.code == 0, rank.err
    summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exchanged"]["scalars"] == {"up": 0, "down": 0}
    assert len({row["loss"] for row in summary["test"]["per_ue"]}) == 1


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (2, {}, "start with --nproc_per_node=3 or more"),
        (1, {"topology__stages": "2"}, "together, every stage has a rank"),
        (4, {"topology__ues": "1"}, "start at most 3 processes"),
        (2, {"method": "centralised"}, "--nproc_per_node=1"),
        (3, {"method": "fedavg", "topology__stages": "2"}, "aggregates on one BTS rank"),
        (3, {"train__bogus": "1"}, "train.bogus"),
        (
            5,
            {"topology__stages": "4", "topology__partition": "type:CRBlock"},
            "leaves BTS stage 2 without parameters",
        ),
        (3, {"topology__partition": "type:Transformer"}, "its layers are CRBlock"),
        (3, {"run__dir": "/proc/nowhere/run"}, "can't be written"),
        (3, {"data__source": "csinet", "data__path": "/nowhere"}, "/nowhere"),
        (3, {"train__device": "cuda"}, "train.device is cuda, but"),
        (3, {"train__lr": "1e30"}, "smashed data of micro-batch 0 from UE 0"),
    ],
)
def test_mistakes_end_every_rank_with_one_message(
    ranks: int, settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    ended = run_program(ranks, arguments(tmp_path / "run", **settings))
    assert [rank.code for rank in ended] == [1] * ranks
    assert len(errors(ended)) == 1
    assert message in "".join(rank.err for rank in ended)
    assert not any("Traceback" in rank.err for rank in ended)
    assert (tmp_path / "run").exists() == ("train__lr" in settings)  # found before training


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    ended = run_program(2, [*arguments(tmp_path / "run"), "--debug"])
    assert "Traceback" in "".join(rank.err for rank in ended)


def test_torchrun_passes_on_the_message_and_a_failure(tmp_path: Path) -> None:
    ended = torchrun(2, arguments(tmp_path / "run"))
    assert ended.returncode != 0
    assert ended.stderr.count("csipipe: error:") == 1


@pytest.mark.parametrize(
    ("method", "rank", "culprit"),
    [
        pytest.param("csilocal", 1, "BTS stage 1", marks=pytest.mark.long),
        pytest.param("csilocal", 3, "UE rank 3", marks=pytest.mark.long),
        pytest.param("fedavg", 0, "BTS stage 0", marks=pytest.mark.long),
        pytest.param("fedavg", 3, "UE rank 3", marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_ends_the_others(
    method: str, rank: int, culprit: str, tmp_path: Path
) -> None:
    endless = arguments(
        tmp_path / "run", method=method, train__iterations="100000", run__eval_every="20"
    )
    with Program(4, endless) as program:
        program.wait_for("iteration 20/")
        program.ranks[rank].kill()
        ended = program.join(timeout=20)
    assert sorted(e.code for e in ended if e.code is not None) == [-9, 1, 1, 1]
    assert len(errors(ended)) == 1
    assert re.search(rf"{culprit}.* is gone: .*iteration \d+, waited for", errors(ended)[0])


@pytest.mark.long  # test_faults.py freezes ranks in the plain suite
@pytest.mark.parametrize(
    ("rank", "culprit"), [(1, "BTS stage 1"), (3, r"UE rank 3 \(UEs 2-3\)")], ids=["BTS", "UE"]
)
def test_a_frozen_rank_ends_the_others_after_the_timeout(
    rank: int, culprit: str, tmp_path: Path
) -> None:
    endless = arguments(
        tmp_path / "run", train__iterations="100000", run__eval_every="20", run__timeout="3"
    )
    with Program(4, endless) as program:
        program.wait_for("iteration 20/")
        pid = program.ranks[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        ended = program.join(timeout=20, without=rank)
    assert {e.code for i, e in enumerate(ended) if i != rank} == {1}
    assert len(errors(ended)) == 1
    pattern = rf"{culprit} is silent: .*iteration \d+, waited for"
    assert re.search(pattern, errors(ended)[0]), errors(ended)


def test_a_failure_while_saving_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_text("in the way")
    ended = run_program(4, arguments(tmp_path / "run"))
    assert {e.code for e in ended} == {1}
    assert len(errors(ended)) == 1
    assert "weights" in errors(ended)[0]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_plain_python_runs_all_roles_in_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "launch/train.py", *arguments(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "RANK"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "together: BTS stage 0 and UE rank 0 (UEs 0-3)\n" in ended.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["topology"]["placement"] == "together"
    assert summary["exchanged"]["scalars"] == {"up": 6 * 4 * 8 * 40, "down": 6 * 4 * 8 * 40}
    assert [file.name for file in (folder / "ranks").iterdir()] == [
        "bts-stage-0-and-ue-rank-0-ues-0-3"
    ]
