"""Run directories made by hand, and a preset small enough to work out its figures on paper."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csipipe.reports import preset as presets
from csipipe.reports import runs
from csipipe.reports.preset import Preset
from csipipe.reports.runs import Run
from csipipe.settings import commandline

FLOOR = 1.0


def preset() -> Preset:
    """8 × 8 inputs: 128 reals, so that 1/8 is c = 16 and 1/4 is c = 32."""
    laptop = presets.load("laptop", user=["--model.angles", "8", "--model.delays", "8"])
    return replace(laptop, compression=(16, 8, 4), seeds=(0, 1, 2), rates={})


def finish(
    run: Run,
    losses: Sequence[float],
    scalars: int = 100,
    spread: float = 0.0,
    holdout: float | None = None,
) -> None:
    """Write what a finished run leaves: an evaluation per loss, `scalars` exchanged before each.

    The UEs' losses are the loss minus and plus half the spread.
    """
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(commandline.to_yaml(run.settings))
    lines = []
    for i, loss in enumerate(losses, 1):
        up, down = scalars * i // 2, scalars * i - scalars * i // 2
        test = {
            "loss": loss,
            "nmse_db": -1.0 * i,
            "floor_loss": FLOOR,
            "per_ue": [{"ue": u, "loss": loss + (u - 0.5) * spread} for u in (0, 1)],
        }
        lines.append(
            {
                "iteration": 10 * i,
                "exchanged": {
                    "scalars": {"up": up, "down": down},
                    "bytes": {"up": 4 * up, "down": 4 * down},
                },
                "test": test,
                "holdout": None if holdout is None else {"loss": holdout, "nmse_db": -1.0},
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "history.jsonl").write_text(text)
    summary = {"status": "finished", "iterations": 10 * len(losses), "test": lines[-1]["test"]}
    (run.folder / "summary.json").write_text(json.dumps(summary))


def a_run(out: Path, method: str = "csilocal", seed: int = 0) -> Run:
    return runs.make(preset(), out, method, "outdoor", 4, seed)


def options(out: Path, **others: object) -> Namespace:
    """Options of a report that starts nothing."""
    usual = Namespace(preset="laptop", quick=False, collect=True, jobs=1, seeds=None, settings=[])
    usual.processes, usual.decided, usual.quick_seeds = None, (), None
    return Namespace(out=str(out), **(vars(usual) | others))
