"""The Triton CRBlock's own check, as a step: its numbers, kernels and settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from csipipe.gpucheck.findings import Step

SCRIPT = Path(__file__).with_name("triton_step.py")
_SHOWN = 14000  # characters


def run(step: Step) -> None:
    """Run the check; what it printed goes onto the page."""
    found = step.folder / "triton.json"
    seconds = max(5.0, step.left - 12)
    line = [sys.executable, str(SCRIPT), "--device", step.device.type, "--out", str(found)]
    with open(step.folder / "triton.txt", "w") as log:
        process = subprocess.Popen([*line, "--seconds", f"{seconds:.0f}"], stdout=log)
        try:
            code = process.wait(max(1.0, step.left - 3))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    step.show((step.folder / "triton.txt").read_text()[-_SHOWN:])
    if found.is_file():
        step.keep(found)
    step.add("the check's exit code", code, "0", code == 0)
