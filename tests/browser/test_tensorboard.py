"""What a person sees who opens TensorBoard on finished runs."""

from __future__ import annotations

import gzip
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from server import tensorboard, train

if TYPE_CHECKING:
    from page import Page

pytestmark = pytest.mark.browser
RUNS = ("lr-1e-3", "lr-4e-3")


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two runs, the first one profiled."""
    root = tmp_path_factory.mktemp("sweep")
    for name, profile in zip(RUNS, ("true", "false"), strict=True):
        train(root / name, train__lr=name.removeprefix("lr-"), run__profile=profile)
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


def test_scalars_of_the_run_and_of_each_rank(page: Page) -> None:
    page.open("scalars", *RUNS, "ranks/bts-stage-0", "test", "against_kilobytes")
    page.shoot("scalars")


def test_the_five_figures_that_matter_come_first(page: Page) -> None:
    page.open(
        "custom_scalars",
        "What matters",
        "test NMSE in dB",
        "loss: training",
        "exchanged kilobytes",
        "iteration: compute",
        "iteration: wait",
    )
    page.wait_until("svg path, canvas", 5)
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
    query = urllib.parse.urlencode({"run": run, "worker": worker, "span": "default"})
    with urllib.request.urlopen(f"{url}/data/plugin/pytorch_profiler/trace?{query}") as answer:
        return gzip.decompress(answer.read()).decode()


def test_the_profile_tab_has_the_instructions_of_every_rank(page: Page) -> None:
    """Its charts need the internet (gstatic.com), so what it lists and what it draws is read."""
    if find_spec("torch_tb_profiler") is None:
        pytest.fail("no torch-tb-profiler here: pip install -c constraints.txt -e '.[profile]'")
    run = f"{RUNS[0]}/profile"
    page.open("pytorch_profiler", run, "Workers bts-stage-0")
    page.shoot("profile")
    for worker, names in (
        ("bts-stage-0", ("forward 1", "weight gradients 1", "step")),
        ("ue-rank-2-ues-0-1", ("encode", "head 1", "wait for BTS stage 1")),
    ):
        drawn = trace(page.url, run, worker)
        assert [name for name in names if f'"{name}"' not in drawn] == []
