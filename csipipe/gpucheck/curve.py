"""The paper preset on generated channels, for as many iterations as time allows."""

from __future__ import annotations

import json
import time

from csipipe.files import shipped
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.runs import Run

_CLOSING = 20.0
"""Seconds in which a run that is told to stop evaluates, saves and ends."""


def run(step: Step) -> None:
    """Train until little time is left, then ask the run to stop; the curve goes onto the page."""
    arguments = {
        "config": shipped("launch/configs/paper.yaml"),
        "data.source": "synthetic",
        "data.path": "null",
        "data.train_samples": 2000 if step.tiny else 130000,
        "data.test_samples": 64 if step.tiny else 5000,
        "train.device": step.device.type,
        "topology.stages": 1,
        "topology.placement": "together",
        "run.eval_every": 2 if step.tiny else 250,
        "run.save_every": 100000,
    }
    if step.tiny:
        arguments |= {"train.batch_size": 8, "train.iterations": 6, "train.threads": 1}
    run = Run(step.folder / "paper", 1, arguments)
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
    step.show("\n".join(lines))
    summary = run.summary
    ms = 1000 * summary["seconds_per_iteration"]
    step.add("iterations", f"{summary['iterations']}, {ms:.1f} ms each (median)")
