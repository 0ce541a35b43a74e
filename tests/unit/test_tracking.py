"""What a run writes for TensorBoard, read back as TensorBoard reads it; and the log's lines."""

from __future__ import annotations

import io
import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from torch import nn

from csipipe.comm.ledger import Kind, Ledger
from csipipe.measure.clock import Clock
from csipipe.measure.figures import Figures
from csipipe.measure.probe import Probe
from csipipe.settings.config import Settings, TrainSettings
from csipipe.settings.tables import SourceSpec
from csipipe.tracking import BEGINNING, HISTORY, Events, RankTracker, Tracker, rank
from csipipe.tracking.reconstruction import draw, pick
from csipipe.tracking.screen import Screen

SETTINGS = Settings(train=TrainSettings(iterations=20, lr=0.25))
FOREIGN = b"not a record at all, whoever wrote it"


def figures(*rows: tuple[float, float, float]) -> Figures:
    """Rows, loss and linear NMSE of each UE."""
    sums = [[n, n * loss, n * nmse, n * 2e-3, 0.0] for n, loss, nmse in rows]
    return Figures(torch.tensor(sums, dtype=torch.float64))


def exchanged(kilobytes: int) -> Ledger:
    """A ledger of one UE that sent so much in fp32."""
    ledger = Ledger(1)
    ledger.count(Kind.SMASHED, range(1), 250 * kilobytes, 1000 * kilobytes)
    return ledger


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), {"scalars": 0, "images": 0})  # keep all
    found.Reload()
    return found


def points(folder: Path, tag: str) -> Any:
    """(step, value) of a curve, a list."""
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def train(tracker: Tracker, start: int, stop: int, loss: Callable[[int], float]) -> None:
    """Iterations start+1 … stop, with an evaluation after every fifth."""
    for done in range(start + 1, stop + 1):
        tracker.iteration(done, figures((8, loss(done), 0.5), (8, loss(done), 0.1)), 0.1, 0.5)
        if done % 5 == 0:
            tracker.evaluation(done, figures((9, loss(done), 0.5)), None, exchanged(2 * done))


def test_training_curves_have_mean_and_band_over_the_ues_that_took_part(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, SETTINGS, 0)
    tracker.iteration(1, figures((8, 1e-3, 0.1), (8, 3e-3, 1.0), (0, 0.0, 0.0)), 0.1, 0.5)
    expected = {"loss": 2e-3, "loss_min": 1e-3, "loss_max": 3e-3}
    expected |= {"nmse_db": -2.596, "nmse_db_min": -10.0, "nmse_db_max": 0.0}
    for name, value in expected.items():
        assert points(tmp_path, f"train/{name}") == [(1, pytest.approx(value, abs=1e-3))]
    assert points(tmp_path, "train/lr") == [(1, pytest.approx(0.1))]
    assert points(tmp_path, "speed/samples_per_second") == [(1, pytest.approx(16 / 0.5))]


def test_a_long_runs_curves_have_as_many_points_as_tensorboard_keeps(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, Settings(train=TrainSettings(iterations=3000)), 0)
    for done in range(1, 3001):
        tracker.iteration(done, figures((8, 1e-3, 0.1)), 0.1, float(done))
    found = points(tmp_path, "time/seconds_per_iteration")
    assert [step for step, _ in found] == list(range(3, 3001, 3))
    assert [value for _, value in found[:2]] == [2.0, 5.0]  # means of three, not the last ones


def test_the_loss_is_also_drawn_against_what_was_exchanged(tmp_path: Path) -> None:
    train(Tracker(tmp_path, SETTINGS, 0), 0, 10, lambda done: 1 / done)
    expected = [(10, pytest.approx(1 / 5)), (20, pytest.approx(1 / 10))]
    assert points(tmp_path, "against_kilobytes/test_loss") == expected
    scalars = points(tmp_path, "against_kiloscalars/test_nmse_db")
    assert [step for step, _ in scalars] == [2, 5]


def test_the_curve_says_what_each_ue_has_exchanged(tmp_path: Path) -> None:
    ledger = Ledger(3)
    ledger.count(Kind.SMASHED, [0, 2], 20, 80)
    ledger.count(Kind.OUTPUT, [2], 5, 20)
    ledger.count(Kind.STATISTICS, [1], 5, 20)  # counted apart
    Tracker(tmp_path, SETTINGS, 0).evaluation(5, figures((9, 1.0, 0.5)), None, ledger)
    [line] = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert line["bytes_of_each"] == [40, 0, 60]


def test_a_full_disk_ends_no_training_and_the_curve_is_whole_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, SETTINGS, 0)
    train(tracker, 0, 5, lambda done: 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))  # as if there were no more room
    try:
        train(tracker, 5, 10, lambda done: 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path / HISTORY} can't be written: File too large" in capsys.readouterr().err
    train(tracker, 10, 15, lambda done: 1.0)
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [5, 10, 15]


def test_a_resumed_runs_curves_have_each_step_once(tmp_path: Path) -> None:
    first = Tracker(tmp_path, SETTINGS, 0)
    train(first, 0, 5, lambda done: 1.0)
    progress = json.loads(json.dumps(first.progress()))
    progress |= {"seconds": [1.0] * 501 + [100.0] * 499, "seconds_total": 1000.0}
    train(first, 5, 12, lambda done: 2.0)  # lost: there is no checkpoint of it
    again = Tracker(tmp_path, SETTINGS, 5)
    again.resume(progress)
    assert again.seconds_per_iteration == 1  # the median of all 1,000
    assert 1000 < again.progress()["seconds_total"] < 1100
    train(again, 5, 15, lambda done: 3.0)
    steps = [*range(1, 16)]
    assert points(tmp_path, "train/loss") == [(k, 1.0 if k <= 5 else 3.0) for k in steps]
    expected = [(10, 1.0), (20, 3.0), (30, 3.0)]
    assert points(tmp_path, "against_kilobytes/test_loss") == expected
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [5, 10, 15]


def test_a_run_that_begins_again_forgets_the_points_of_before(tmp_path: Path) -> None:
    train(Tracker(tmp_path, SETTINGS, 0), 0, 7, lambda done: 1.0)
    again = Tracker(tmp_path, SETTINGS, 0)
    again.resume(BEGINNING)
    train(again, 0, 3, lambda done: 2.0)
    assert points(tmp_path, "train/loss") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert points(tmp_path, "against_kilobytes/test_loss") == []
    assert (tmp_path / HISTORY).read_text() == ""


@pytest.mark.parametrize("whole", [True, False], ids=["foreign", "half"])
def test_events_that_are_there_already_do_no_harm(tmp_path: Path, whole: bool) -> None:
    before = tmp_path / "events.out.tfevents.0000000001.elsewhere.1.0"
    if whole:
        before.write_bytes(FOREIGN)
    else:
        train(Tracker(tmp_path, SETTINGS, 0), 0, 7, lambda done: 1.0)
        (file,) = tmp_path.glob("events*")
        before.write_bytes(file.read_bytes()[:-9])
        file.unlink()
    tracker = Tracker(tmp_path, SETTINGS, 0)
    train(tracker, 0, 3, lambda done: 2.0)
    assert points(tmp_path, "train/loss") == [(1, 2.0), (2, 2.0), (3, 2.0)]


def test_a_folder_that_cant_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks").write_text("a file of someone else's")
    events = Events(tmp_path / "ranks" / "bts-stage-0", first=1)
    events.scalars({"a": 1.0}, 1)
    events.close()
    error = capsys.readouterr().err
    assert error.count("csipipe: warning: TensorBoard's events can't be written") == 1
    assert "training continues without" in error


def test_a_full_disk_ends_the_curves_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = Events(tmp_path, first=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        events.scalars({f"a curve's name/{k}": 1.0 for k in range(8000)}, 1)
        events.scalars({"b": 1.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    events.scalars({"b": 1.0}, 3)
    events.close()
    assert capsys.readouterr().err.count("can't be written") == 1
    assert "b" not in read(tmp_path).Tags()["scalars"]


def test_settings_are_text_and_hparams_with_final_metrics(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, SETTINGS, 0)
    found = read(tmp_path)
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    train:\n      iterations: 20\n" in text
    hparams = found.summary_metadata
    start = metadata.parse_session_start_info_plugin_data(
        hparams[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    assert start.hparams["train.lr"].number_value == 0.25
    assert start.hparams["method"].string_value == "csilocal"
    assert not any(name.startswith("run.") for name in start.hparams)
    experiment = metadata.parse_experiment_plugin_data(
        hparams[metadata.EXPERIMENT_TAG].plugin_data.content
    )
    first = [info.name for info in experiment.hparam_infos if info.differs]
    assert first == ["method", "model.c1", "data.environment", "train.lr", "train.seed"]
    metrics = {info.name.tag for info in experiment.metric_infos}
    train(tracker, 0, 5, lambda done: 1.0)
    assert metrics <= set(read(tmp_path).Tags()["scalars"])  # each has a last point
    assert "test/nmse_db" in metrics


def test_the_layout_puts_five_figures_first_and_all_exist(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, SETTINGS, 0)
    train(tracker, 0, 5, lambda done: 1.0)
    mine = RankTracker(tmp_path, "BTS stage 0", Worker(), 20, 0, draws=False)
    mine.before(1)
    mine.after(1)
    found = read(tmp_path)
    layout = layout_pb2.Layout()
    config = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout.ParseFromString(config)
    (category,) = layout.category
    assert len(category.chart) == 5
    of_ranks = [c.multiline.tag for c in category.chart if c.title.startswith("seconds per it")]
    assert [list(tags) for tags in of_ranks] == [["time/compute"], ["time/wait"]]
    tags = [*found.Tags()["scalars"], *read(tmp_path / "ranks/bts-stage-0").Tags()["scalars"]]
    for chart in category.chart:
        wanted = list(chart.multiline.tag)
        for series in chart.margin.series:
            wanted += [series.value, series.lower, series.upper]
        missing = [w for w in wanted if not any(re.match(w, tag) for tag in tags)]
        assert missing in ([], ["holdout/loss$"])  # this run holds no rows out


class Worker:
    """As much of a worker as a rank's tracker looks at."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.probe = Probe()


def test_a_rank_writes_its_time_norms_and_memory(tmp_path: Path) -> None:
    worker = Worker()
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    mine = RankTracker(tmp_path, "UE rank 3 (UEs 2-3)", worker, 200, 0, draws=False)
    for done in range(1, 5):
        mine.before(done)
        worker.probe.gradients({"encoder": layer})
        worker.clock.seconds["compute"] += 0.5 * done
        mine.after(done)
    folder = tmp_path / "ranks" / "ue-rank-3-ues-2-3"
    assert points(folder, "time/compute") == [
        (2, pytest.approx((0.5 + 1.0) / 2)),
        (4, pytest.approx((1.5 + 2.0) / 2)),
    ]
    assert points(folder, "time/wait") == [(2, 0.0), (4, 0.0)]
    assert points(folder, "gradient_norm/encoder") == [(2, 5.0), (4, 5.0)]
    assert points(folder, "memory/peak_mib")[0][1] > 10


def test_norms_are_a_mean_over_ues_and_taken_only_when_wanted() -> None:
    probe, layers = Probe(), [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for layer, value in zip(layers, (2.0, -4.0), strict=True):
        layer.weight.grad = torch.tensor([[value]])
        probe.gradients({"head": layer})
    assert probe.norms() == {}
    probe.gradients_wanted = True
    for layer in layers:
        probe.gradients({"head": layer, "nothing": nn.Flatten()})
    assert probe.norms() == {"head": 3.0}
    assert probe.norms() == {}


def images(errors: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Originals of one strong bin, and reconstructions whose centred NMSE is `errors`."""
    h = torch.full((len(errors), 2, 4, 8), 0.5)
    h[:, 0, 1, 2] = 1.0
    h_hat = h.clone()
    h_hat[:, 0, 1, 2] -= 0.5 * torch.tensor(errors).sqrt()
    return h, h_hat


def test_the_worst_and_the_median_sample_are_picked() -> None:
    assert pick(torch.tensor([0.2, 0.9, 0.1, 0.5, 0.3])) == (1, 4)
    assert pick(torch.tensor([0.2, float("nan"), 0.1, float("inf"), 0.3])) == (4, 0)
    assert pick(torch.tensor([float("nan")])) == (0, 0)


def test_a_picture_shows_each_bin_at_its_place_and_level() -> None:
    h, h_hat = images([1.0, 0.01, 0.0])  # the worst: nothing left; the median: a tenth too weak
    h[:, 1, 3, 7] += 0.05  # -20 dB
    image = np.asarray(draw(h, h_hat, "UE 0", SourceSpec.axes))
    zoom, left, top = 32, 78, 46 + 34
    panel = image[top : top + 4 * zoom, left : left + 8 * zoom]
    bins = panel[zoom // 2 :: zoom, zoom // 2 :: zoom]
    assert bins.shape == (4, 8)
    assert bins[3 - 1, 2] == 0  # the peak is black, and angles go up
    assert bins[3 - 3, 7] == pytest.approx(255 * 20 / 30, abs=1)
    assert (bins == 255).sum() == 4 * 8 - 2
    right = image[top : top + 4 * zoom, left + 8 * zoom + 34 :][:, : 8 * zoom]
    assert right[zoom // 2 :: zoom, zoom // 2 :: zoom].min() == 255  # nothing was reconstructed
    weaker = image[top + 4 * zoom + 74 + 34 :, left + 8 * zoom + 34 :]
    # below the original's peak, not its own
    assert weaker[2 * zoom + zoom // 2, 2 * zoom + zoom // 2] == int(255 * 20 * -np.log10(0.9) / 30)


def test_pictures_come_from_ue_0_a_few_times_and_at_the_end(tmp_path: Path) -> None:
    worker = Worker()
    mine = RankTracker(tmp_path, "UE rank 2 (UE 0)", worker, 100, 0, draws=True)
    h, h_hat = images([0.5] * 3)
    for done in [*range(4, 100, 4), 100]:  # evaluations
        mine.before_test(done)
        for ue in (0, 1):
            worker.probe.reconstructed(ue, h, h_hat)
        mine.after_test(done)
    found = read(tmp_path / "ranks" / "ue-rank-2-ue-0").Images("reconstruction")
    assert [event.step for event in found] == [12, 20, 32, 40, 52, 60, 72, 80, 92, 100]
    assert Image.open(io.BytesIO(found[0].encoded_image_string)).width == found[0].width > 500
    worker.probe.reconstructed(0, h, h_hat)
    assert worker.probe.reconstructions() is None  # kept only while an evaluation is drawn


def test_no_more_samples_are_kept_than_wanted() -> None:
    probe = Probe()
    h, h_hat = images([0.5] * 3)
    probe.rows_wanted = 4
    probe.reconstructed(1, h, h_hat)
    assert probe.rows_wanted == 4  # another UE's
    for _ in range(3):
        probe.reconstructed(0, h, h_hat)
    kept = probe.reconstructions()
    assert kept is not None
    assert len(kept[0]) == len(kept[1]) == 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"s": 1000.0}
    monkeypatch.setattr("csipipe.tracking.screen.time.monotonic", lambda: now["s"])
    return now


def test_a_log_gets_a_line_at_first_and_then_every_half_minute(
    clock: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(100, 0)
    for done in range(1, 101):
        clock["s"] += 1.0
        screen.iteration(done, "loss 1e-3")
        if done == 50:
            screen.progress(done, "test loss 2e-3")
    screen.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training 1/100: loss 1e-3"
    assert [re.findall(r"\d+", line)[0] for line in lines] == ["1", "32", "50", "81"]
    assert lines[2] == "iteration 50/100: test loss 2e-3, 00:50 left"
    resumed = Screen(100, 50)
    clock["s"] += 20.0
    resumed.progress(60, "test loss 1e-3")  # ten iterations in 20 s
    assert capsys.readouterr().err == "iteration 60/100: test loss 1e-3, 01:20 left\n"


def test_a_terminal_gets_a_bar_and_no_lines_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    screen = Screen(3, 0)
    for done in (1, 2, 3):
        screen.iteration(done, "loss 1e-3")
    screen.close()
    error = capsys.readouterr().err
    assert "training" not in error
    assert "3/3" in error
    assert "\r" in error


def test_due_points() -> None:
    noted: list[Any] = [k for k in range(1, 251) if rank.due(k, 250, 100)]
    assert noted[:3] == [2, 4, 6]
    assert noted[-1] == 250
    assert [k for k in range(1, 7) if rank.due(k, 6, 100)] == [1, 2, 3, 4, 5, 6]
    # where a look costs much, fewer
    assert [k for k in range(1, 51) if rank.due(k, 50, 100, apart=20)] == [20, 40, 50]
    assert sum(rank.due(k, 9000, 100, apart=20) for k in range(1, 9001)) == 100
