"""Tests import the helpers beside them by name, in this process and in spawned ranks.

None of them writes into the user's cache.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
# threads of tests that run at the same time would wait for each other's cores, spinning
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, all that is started would ignore it


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A plain `pytest` runs files two at a time: many tests wait for ranks, or for time to pass."""
    option = config.option
    chosen = config.args_source != config.ArgsSource.TESTPATHS or option.numprocesses is not None
    usual = option.markexpr in config.getini("addopts")
    worker = "PYTEST_XDIST_WORKER" in os.environ  # comes by here too
    if usual and not (chosen or worker or option.collectonly or option.usepdb):
        option.numprocesses, option.dist = 2, "loadfile"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSIPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cost2100() -> Path:
    """Folder of real COST 2100 files, for tests that look at them where they are present."""
    root = Path(__file__).resolve().parents[1]
    found = Path(os.environ.get("CSIPIPE_COST2100", root / "../shared/data/cost2100"))
    if not found.is_dir():
        pytest.skip("the COST 2100 files are not here; set CSIPIPE_COST2100 to their folder")
    return found
