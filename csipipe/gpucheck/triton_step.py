"""The program on a GPU with and without the Triton kernels.

    python csipipe/gpucheck/triton_step.py --seconds 90 --out triton.json

Each finding is written at once, so that nothing is lost when the time is up. On a CPU it is only
rehearsed: TRITON_INTERPRET=1 … --device cpu.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from csipipe import methods, models
from csipipe.device import set_arithmetic
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import Run, settings
from csipipe.gpucheck.size import paper
from csipipe.gpucheck.timing import milliseconds
from csipipe.methods.centralised import Centralised


class Report:
    """Findings, printed and written as they come."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.found: dict[str, Any] = {}
        self.begun = time.monotonic()

    def add(self, name: str, **values: Any) -> None:
        self.found[name] = values
        shown = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in values.items()
            if k != "all"
        )
        print(f"[{time.monotonic() - self.begun:5.1f}] {name}: {shown}", flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1))

    def left(self) -> float:
        return self.end - time.monotonic()

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        if self.left() < 0:
            self.add(name, skipped="no time left")
            return
        try:
            run()
        except Exception as error:  # the next check may still tell something
            traceback.print_exc()
            self.add(name + " failed", error=str(error)[-600:])


def program(report: Report, step: Step) -> None:
    """The unsplit model as the program trains it: ms, and losses with and without the kernels."""
    for precision in ("fp32", "bf16"):
        losses, tests = {}, {}
        for by in ("triton", "torch"):
            changes = {"model.kernels_by": by, "train.precision": precision}
            made = settings(step.folder / "unsplit", paper(step) | changes)
            ues, test = methods.load(made, range(made.topology.ues), step.device)
            worker = Centralised(made, ues, test, step.device, shared=False)
            losses[by] = [worker.train_iteration(k).loss_per_ue for k in range(5)]
            tests[by] = worker.evaluate("test").loss_per_ue
            ms = milliseconds(partial(worker.train_iteration, 5), step.device, 3, 1)
            notes = models.kernels_notes(made.model, step.device)
            report.add(f"centralised {precision} {by}", ms=ms, notes=notes)
            del worker, ues
        report.add(
            f"centralised {precision} triton beside torch",
            apart=worst(losses),
            evaluation=worst(tests),
            wanted="1e-5 in fp32",
        )


def split(report: Report, step: Step) -> None:
    """The split program, two ranks on the card, as a user starts it."""
    found = {}
    for by in ("triton", "torch"):
        changes = {"model.kernels_by": by, "train.iterations": 5, "run.eval_every": 1}
        changes |= {"topology.stages": 1}
        run = Run(step.folder / by, 2, paper(step) | changes).succeed(max(5.0, report.left()))
        found[by] = run.losses.tolist()
        lines = [x for x in run.log.read_text().splitlines() if "CRBlock" in x or "layers" in x]
        ms = 1000 * run.summary["seconds_per_iteration"]
        report.add(f"split fp32 {by}", ms=ms, notes=lines[:3])
    report.add("split fp32 triton beside torch", apart=worst(found), wanted="1e-5")


def worst(of: dict[str, Any]) -> float:
    """Largest relative difference."""
    ours, theirs = (torch.tensor(of[by], dtype=torch.float64) for by in ("triton", "torch"))
    return float(((ours - theirs).abs() / theirs.abs()).max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    set_arithmetic(tf32=False)
    device = torch.device(args.device)
    report = Report(args.out, args.seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report.add("versions", torch=torch.__version__, triton=triton.__version__, device=name)
    step = Step(device, Path(tempfile.mkdtemp()), args.seconds)
    report.attempt("program", lambda: program(report, step))
    report.attempt("split", lambda: split(report, step))


if __name__ == "__main__":
    main()
