"""Figures of every sample for every UE's model; ranks share the rows.

Rows are processed in blocks that don't depend on the number of ranks, so that with the same number
of threads the figures don't either, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from csipipe.device import autocast
from csipipe.evaluation.testset import Rows
from csipipe.measure import metrics
from csipipe.run.trained import Trained
from csipipe.settings.config import Precision

COLUMNS = ("loss", "floor", "nmse", "rho", "sgcs")
"""Per sample, linear: the paper's loss, that of a constant 0.5, centred NMSE, ρ, SGCS. A row
without energy has no NMSE, ρ and SGCS; without HF_all no row has the last two: NaN."""
BLOCKS = {"cpu": 128, "cuda": 4096}
"""Rows that a model takes at once; a GPU's small eigenvalue problems cost a launch each."""

Total = Callable[[Tensor], Tensor]


def measure(
    models: Sequence[nn.Module],
    rows: Rows,
    precision: Precision,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    total: Total = lambda values: values,
) -> Tensor:
    """(models, B, COLUMNS) float64 on every rank; collective where there are several.

    Args:
        models: (B, 2, A, D) → (B, 2, A, D), in evaluation mode; one given twice runs once.
        total: adds a tensor up over the ranks.

    Raises:
        ValueError: a model's output isn't finite.
    """
    distinct = list(dict.fromkeys(models))
    for model in distinct:
        model.to(device)
    count = len(rows.h_BAD)
    found = torch.zeros(len(distinct), count, len(COLUMNS), dtype=torch.float64)
    block = BLOCKS[device.type]
    for start in range(0, count, block * ranks):  # a round: a block for each rank
        mine = slice(start + rank * block, min(count, start + (rank + 1) * block))
        if mine.start < count:
            found[:, mine] = _block(distinct, rows, mine, precision, device)
        part = found[:, start : start + block * ranks].contiguous()
        found[:, start : start + block * ranks] = total(part)
    return found[[distinct.index(model) for model in models]]


def means(run: Trained, rows: Rows) -> dict[str, float]:
    """Means over samples and UEs by column, on a CPU; raises as `measure` and `Trained.models`."""
    found = measure(run.models(), rows, run.settings.train.precision, torch.device("cpu"))
    return dict(zip(COLUMNS, found.nanmean(1).mean(0).tolist(), strict=True))


def ceiling(rows: Rows) -> tuple[float, float] | None:
    """Mean ρ and SGCS of the images themselves: what truncation to D delays leaves of HF_all."""
    if rows.hf_BAK is None:
        return None
    parts = []
    blocks = (torch.split(x, BLOCKS["cpu"]) for x in (rows.h_BAD, rows.hf_BAK))
    for h, hf in zip(*blocks, strict=True):
        own = rows.response(h)
        parts.append(
            torch.stack([metrics.rho(own, hf), metrics.sgcs(own, hf, rows.subbands)], 1).double()
        )
    rho, sgcs = torch.cat(parts).nanmean(0).tolist()
    return rho, sgcs


def _block(
    models: Sequence[nn.Module],
    rows: Rows,
    mine: slice,
    precision: Precision,
    device: torch.device,
) -> Tensor:
    """(models, rows of the block, COLUMNS)."""
    h = rows.h_BAD[mine].to(device)
    hf = None if rows.hf_BAK is None else rows.hf_BAK[mine].to(device)
    floor = metrics.floor_loss(h).double()
    empty = floor == 0
    v = None if hf is None else metrics.directions(hf, rows.subbands)
    found = torch.full((len(models), len(h), len(COLUMNS)), torch.nan, dtype=torch.float64)
    for number, model in enumerate(models):
        with torch.no_grad(), autocast(precision, device):
            h_hat = model(h).float()
        if not h_hat.isfinite().all():
            raise ValueError(f"model {number} reconstructs values that aren't finite.")
        loss = metrics.paper_loss(h_hat, h).double()
        columns = [loss, floor, loss / floor]
        if hf is not None and v is not None:
            hf_hat = rows.response(h_hat)
            columns.append(metrics.rho(hf_hat, hf).double())
            columns.append(
                metrics.similarity(metrics.directions(hf_hat, rows.subbands), v).double()
            )
        for column, values in enumerate(columns):
            if column >= 2:
                values = values.masked_fill(empty, torch.nan)
            found[number, :, column] = values.cpu()
    return found
