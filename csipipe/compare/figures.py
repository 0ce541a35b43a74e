"""What a comparison shows of each run: quality on the test set, and what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from csipipe import models
from csipipe.evaluation import samples
from csipipe.evaluation.testset import Rows
from csipipe.export.parts import operations
from csipipe.measure.metrics import to_db
from csipipe.methods.cost import feedback_bits
from csipipe.reports.runs import Run
from csipipe.run import trained


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One run."""

    model: str
    c1: int
    """The model's; with model.split, something else crosses."""
    seed: int
    iterations: int
    nmse_db: float
    """Centred; mean over samples and UEs of linear values."""
    rho: float
    sgcs: float
    """NaN, as ρ, where the data have no HF_all."""
    parameters: int
    """Of encoder, tail and head."""
    macs_at_ue: int
    """Multiply-accumulates of encoder and head per sample."""
    feedback_bits: int
    """Per sample: the codeword as it is sent, not quantised further."""
    seconds: float
    """Of training: iterations times the median of one, without evaluations."""
    ceiling: int | None
    """Components of the PCA, fitted to unlimited rows, that it can't beat; None: its decoder
    doesn't end linearly."""


def measure(run: Run, rows: Rows) -> Figures:
    """Figures of a finished run.

    Raises:
        ValueError: weights that are missing or damaged.
    """
    found = trained.read(run.folder)
    settings, values = found.settings, samples.means(found, rows)
    first, h_BAD = found.models([0])[0], rows.h_BAD[:1]
    with torch.no_grad():
        y = first.tail(first.encoder(h_BAD))
    summary = json.loads((run.folder / "summary.json").read_text())
    return Figures(
        model=settings.model.name,
        c1=settings.model.c1,
        seed=settings.train.seed,
        iterations=summary["iterations"],
        nmse_db=to_db(values["nmse"]),
        rho=values["rho"],
        sgcs=values["sgcs"],
        parameters=sum(models.count_parts(settings.model).values()),
        macs_at_ue=operations(first.encoder, h_BAD) + operations(first.head, y),
        feedback_bits=feedback_bits(settings),
        seconds=summary["seconds_per_iteration"] * summary["iterations"],
        ceiling=models.ceiling(settings.model),
    )
