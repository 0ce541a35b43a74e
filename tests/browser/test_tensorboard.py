"""What a person sees who opens TensorBoard on finished runs."""

from __future__ import annotations

import dataclasses
import gzip
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from server import tensorboard, train
from torch.profiler import profile, tensorboard_trace_handler

from csipipe.config import RunSettings

if TYPE_CHECKING:
    from page import Page

pytestmark = pytest.mark.browser
RUNS = ("lr-1e-3", "lr-4e-3")
PROFILES = "profile" in {field.name for field in dataclasses.fields(RunSettings)}


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two runs, with traces where there is something to show them."""
    root = tmp_path_factory.mktemp("sweep")
    for name in RUNS:
        train(root / name, train__lr=name.removeprefix("lr-"))
    if find_spec("torch_tb_profiler") is not None:
        write_trace(root / RUNS[0] / "ranks" / "bts-stage-0")
        if PROFILES:
            train(root / "profiled", run__profile="true")
    return root


@pytest.fixture(scope="module")
def page(logdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Chromium on a TensorBoard. Screenshots go to the folder that CSIPIPE_SCREENSHOTS names."""
    if find_spec("selenium") is None:
        pytest.fail("no selenium here: pip install -c constraints.txt -e '.[browser]'")
    from page import Page

    chosen = os.environ.get("CSIPIPE_SCREENSHOTS")
    screenshots = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    screenshots.mkdir(parents=True, exist_ok=True)
    with tensorboard(logdir) as url:
        opened = Page(url, screenshots)
        yield opened
        opened.close()


def write_trace(folder: Path) -> None:
    """A trace of one named range, as torch.profiler writes it."""
    with (
        profile(on_trace_ready=tensorboard_trace_handler(str(folder), "bts-stage-0")),
        torch.profiler.record_function("F2 of micro-batch 3"),
    ):
        torch.nn.Linear(8, 8)(torch.zeros(4, 8)).sum().backward()


def test_scalars_of_the_run_and_of_each_rank(page: Page) -> None:
    page.open("scalars", *RUNS, "ranks/bts-stage-0", "test", "against_exchanged_kilobytes")
    page.shoot("scalars")


def test_the_four_figures_that_matter_come_first(page: Page) -> None:
    page.open(
        "custom_scalars",
        "What matters",
        "test NMSE in dB",
        "loss: training",
        "exchanged kilobytes",
        "compute, wait",
    )
    page.wait_until("svg path, canvas", 4)
    page.shoot("custom-scalars")


def test_pictures_of_reconstructions(page: Page) -> None:
    page.open("images", "reconstruction", "ranks/ue-rank-2-ues-0-1")
    page.wait_until("img", 2, "e.naturalWidth > 500")
    page.shoot("images")


def test_a_sweep_is_compared_in_one_view(page: Page) -> None:
    page.open("hparams", *RUNS, "train.lr", "test/nmse_db", "0.0010000", "0.0040000")
    page.shoot("hparams")


def test_settings_are_text(page: Page) -> None:
    page.open("text", "settings", "batch_size: 8")
    page.shoot("text")


def trace(url: str, run: str, worker: str) -> str:
    """What the PROFILE tab's trace view draws."""
    query = urllib.parse.urlencode({"run": run, "worker": worker, "span": "1"})
    with urllib.request.urlopen(f"{url}/data/plugin/pytorch_profiler/trace?{query}") as answer:
        return gzip.decompress(answer.read()).decode()


def test_the_profile_tab_has_a_trace(page: Page) -> None:
    """Its charts need the internet (gstatic.com), so what it lists and what it draws is read."""
    if find_spec("torch_tb_profiler") is None:
        pytest.fail("no torch-tb-profiler here: pip install -c constraints.txt -e '.[profile]'")
    run = f"{RUNS[0]}/ranks/bts-stage-0"
    page.open("pytorch_profiler", run, "Workers bts-stage-0")
    page.shoot("profile")
    assert "F2 of micro-batch 3" in trace(page.url, run, "bts-stage-0")


def test_the_profile_tab_has_a_run_of_ours(page: Page) -> None:
    if not PROFILES:
        pytest.skip("there is no run.profile yet")
    page.open("pytorch_profiler", "profiled")
    page.shoot("profiled-run")
