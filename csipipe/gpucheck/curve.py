"""The paper preset on generated channels, for as many iterations as time allows."""

from __future__ import annotations

import json
import time

from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import ROOT, Run

_LONG = 400.0
"""Seconds from which on the preset's 130,000 rows are worth the minutes that making them takes."""
_CLOSING = 20.0
"""Seconds in which a run that is told to stop evaluates, saves and ends."""


def run(step: Step) -> None:
    """Train until little time is left, then ask the run to stop; the curve goes onto the page."""
    rows = 130_000 if step.left > _LONG else 20_000
    arguments = {
        "config": ROOT / "launch" / "configs" / "paper.yaml",
        "data.source": "synthetic",
        "data.path": "null",
        "data.train_samples": 2000 if step.tiny else rows,
        "data.test_samples": 64 if step.tiny else rows // 10,
        "train.device": step.device.type,
        "topology.stages": 1,
        "run.eval_every": 2 if step.tiny else 250,
        "run.save_every": 100000,
    }
    if step.tiny:
        arguments |= {"train.batch_size": 8, "train.iterations": 6, "train.threads": 1}
    run = Run(step.folder / "paper", 2, arguments)
    stop = step.folder / "paper" / "stop"
    while run.process.poll() is None:
        if step.left < _CLOSING and stop.parent.is_dir() and not stop.exists():
            stop.touch()
        if step.left < 2:
            break
        time.sleep(0.5)
    run.succeed(1)
    step.keep(run.folder / "history.jsonl")
    history = (run.folder / "history.jsonl").read_text().splitlines()
    lines = ["iteration   test loss   NMSE (dB)"]
    for line in map(json.loads, history):
        test = line["test"]
        lines.append(f"{line['iteration']:>9}   {test['loss']:.3e}   {test['nmse_db']:>9.2f}")
    step.findings.show("\n".join(lines))
    summary = run.summary
    ms = 1000 * summary["seconds_per_iteration"]
    step.add("rows to train on", arguments["data.train_samples"])
    step.add("iterations", f"{summary['iterations']}, {ms:.1f} ms each (median)")
