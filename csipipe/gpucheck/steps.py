"""The steps in order; python -m csipipe.gpucheck.steps NAME DEVICE FOLDER SECONDS does one."""

from __future__ import annotations

import faulthandler
import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from csipipe.device import set_arithmetic
from csipipe.gpucheck.findings import Step


@dataclass(frozen=True)
class Planned:
    """A step: its name and title, the function that does it, its limit in seconds.

    Attributes:
        alone: it needs the GPU for itself: it waits for the steps before it, those after it for it.
    """

    name: str
    about: str
    function: str
    limit: float
    alone: bool = True


STEPS = (
    Planned("versions", "Versions and settings", "versions:run", 40),
    Planned("compile", "Triton's kernels, by all processors", "compiling:run", 70),
    Planned("program", "The program at the paper's size", "size:program", 110),
    Planned("devices", "Centralised, beside the CPU and twice", "parity:centralised", 90, False),
    Planned("split", "Split training beside the unsplit model", "parity:split", 130, False),
    Planned("resume", "Resuming", "endings:resume", 110, False),
    Planned("faults", "Faults", "endings:faults", 110, False),
    Planned("crblock", "The Triton CRBlock", "crblock:run", 90),
    Planned("unsplit", "The paper's size, one process", "size:unsplit", 60),
    Planned("kernels", "Kernels at (4000, 7, 32, 32)", "kernels:run", 70),
    Planned("peer", "The paper's size, stock layers and torch.compile", "peer:run", 100),
    Planned("curve", "The paper preset on generated channels", "curve:run", 1800),
)
"""In order: what decides most first, as time may run out. Steps that don't need the device alone
run side by side."""


def main(name: str, device: str, folder: str, seconds: str) -> int:
    """Do one step; what it found lies in FOLDER/found.json, its error on stderr."""
    planned = next(step for step in STEPS if step.name == name)
    step = Step(torch.device(device), Path(folder), float(seconds))
    set_arithmetic(tf32=False)
    faulthandler.dump_traceback_later(max(1.0, step.seconds - 1))  # says where it was
    try:
        module, _, function = planned.function.partition(":")
        getattr(import_module(f"csipipe.gpucheck.{module}"), function)(step)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
