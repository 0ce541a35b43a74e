"""csipipe from a wheel, in an empty folder: every command, and the files that come along."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_reproduce import TINY

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("csipipe", "ds_configs", "launch", "slurm"),
    *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
)
SHIPPED = ("ds_configs", "launch/configs", "slurm")
SETTINGS = {
    "model.angles": "8",
    "model.delays": "8",
    "model.c1": "16",
    "model.c2": "16",
    "data.train_samples": "80",
    "data.test_samples": "20",
    "train.batch_size": "8",
    "train.iterations": "2",
}
RUN = [word for key, value in SETTINGS.items() for word in (f"--{key}", value)]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with csipipe installed from its wheel, and nothing else."""
    tree, site = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site")
    for name in SOURCES:  # built from a copy: what lies in the checkout's build/ would get in
        ignored = shutil.ignore_patterns("__pycache__")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tree / "dist")]
    subprocess.run([*pip, *build, str(tree)], check=True, timeout=300)
    [wheel] = (tree / "dist").glob("csipipe-*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, *install, str(wheel)], check=True, timeout=300)
    return site


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which everything is started."""
    return tmp_path_factory.mktemp("empty")


def python(site: Path, folder: Path, *words: str) -> str:
    """What `python WORDS` prints, with the wheel's csipipe before any other."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(site: Path, empty: Path) -> str:
    """A run's directory, relative to the empty folder."""
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=4")
    # a file of the repository by its name there: it came along
    preset = ("--config", "launch/configs/laptop.yaml")
    line = ("-m", "csipipe", "train", *preset, *RUN, "--run.dir", "run")
    out = python(site, empty, *torchrun, *line)
    assert "NMSE (dB)" in out
    assert [path.name for path in empty.iterdir()] == ["run"]
    return "run"


def test_it_is_the_wheels_and_has_the_trees_files(site: Path, empty: Path) -> None:
    found = python(site, empty, "-c", "import csipipe; print(csipipe.__file__)")
    assert Path(found.strip()).is_relative_to(site)
    for folder in SHIPPED:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        names = [str(path.relative_to(ROOT / folder)) for path in files]
        placed = site / "csipipe" / "shipped" / folder
        assert filecmp.cmpfiles(ROOT / folder, placed, names, shallow=False) == (names, [], [])
        assert len(names) > 2


def test_train_and_evaluate(site: Path, empty: Path, run: str) -> None:
    assert "percentile" in python(site, empty, "-m", "csipipe", "evaluate", run)


def test_export(site: Path, empty: Path, run: str) -> None:
    line = ("export", run, "--ue", "1", "--formats", "pt2", "--out", "exported")
    assert "feedback per channel" in python(site, empty, "-m", "csipipe", *line)
    script = str(empty / "exported" / "feedback.py")
    assert "NMSE" in python(site, empty, script)


def test_channels(site: Path, empty: Path) -> None:
    sizes = ("--train", "40", "--val", "8", "--test", "8")
    python(site, empty, "-m", "csipipe", "channels", "generate", "data", *sizes)
    assert "DATA_Htestin" in python(site, empty, "-m", "csipipe", "channels", "check", "data")


def test_reproduce_starts_its_runs(site: Path, empty: Path) -> None:
    (empty / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"headline": ["csilocal"]}))
    line = ("headline", "--preset", "tiny.yaml", "--out", "report")
    python(site, empty, "-m", "csipipe", "reproduce", *line)
    [summary] = (empty / "report" / "runs").glob("*/summary.json")
    assert json.loads(summary.read_text())["status"] == "finished"


def test_reproduce_knows_the_presets(site: Path, empty: Path) -> None:
    plan = python(site, empty, "-m", "csipipe", "reproduce", "plan", "--preset", "paper")
    assert "10 UEs, B = 800" in plan


def test_benchmark(site: Path, empty: Path) -> None:
    line = ("benchmark", "--rounds", "1", "--only", "ours", *RUN)
    assert "ours" in python(site, empty, "-m", "csipipe", *line)


def test_the_sbatch_scripts(site: Path, empty: Path) -> None:
    printed = python(site, empty, "-m", "csipipe", "slurm", "--copy", "slurm")
    names = sorted(path.name for path in (ROOT / "slurm").iterdir())
    assert sorted(path.name for path in (empty / "slurm").iterdir()) == names
    assert printed.splitlines() == [f"slurm/{n}" for n in names if n.endswith(".sbatch")]
