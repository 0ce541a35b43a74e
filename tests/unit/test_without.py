"""Training and gpucheck start where SciPy, h5py, matplotlib and llvmlite are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_WITHOUT = """
import sys

for name in ("scipy", "h5py", "matplotlib", "llvmlite"):
    sys.modules[name] = None  # importing it raises ImportError
"""
_TRAIN = """
import csipipe.gpucheck.command, csipipe.gpucheck.curve, csipipe.gpucheck.kernels
import csipipe.gpucheck.parity, csipipe.gpucheck.peer
import csipipe.gpucheck.runs, csipipe.gpucheck.size
import csipipe.methods.centralised, csipipe.methods.csilocal, csipipe.methods.fedavg
import csipipe.methods.splitfed, csipipe.profiling, csipipe.run.training
from csipipe import channels
from csipipe.channels import statistics
from csipipe.run import ceiling
from csipipe.settings.config import DataSettings, ModelSettings, Settings

data = DataSettings(train_samples=20, test_samples=8)
settings = channels.sized(Settings(data=data, model=ModelSettings(c1=4)))
beside = ceiling.find(settings)  # what a finished run is compared with
assert beside is not None and beside.components == 4, beside
print(beside.nmse_db)
"""
_READ = """
from pathlib import Path
from csipipe.channels import doctor, matfile, rawarray

path = Path(sys.argv[1])
print(doctor.examine(path).findings[0].what)
for read in (matfile.count_rows, lambda path: rawarray.opened(path).__enter__()):
    try:
        read(path)
    except ValueError as error:
        print(error)
"""


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_and_gpucheck() -> None:
    """And NumPy finds the same components as SciPy."""
    without, beside = _run(_WITHOUT + _TRAIN), _run(_TRAIN)
    assert float(without) == pytest.approx(float(beside), abs=1e-3)


def test_a_file_that_needs_h5py_says_so(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htrainin.mat"
    path.write_bytes(b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + bytes(400))
    lines = _run(_WITHOUT + _READ, str(path)).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert str(path) in line
        assert "pip install h5py" in line


@pytest.mark.parametrize("module", ["csipipe", "launch.evaluate"])
def test_a_command_that_needs_one_says_so(module: str) -> None:
    words = ["evaluate"] if module == "csipipe" else []
    said = _run(
        f"{_WITHOUT}\nimport runpy\nsys.stderr = sys.stdout\nsys.argv[1:] = {words} + ['RUN']\n"
        f"try:\n    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 1"
    )
    assert "evaluate needs matplotlib" in said
    assert "pip install matplotlib" in said
