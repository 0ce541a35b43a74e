"""A finished run's learning curve, read from `history.jsonl`, `summary.json`, and checked.

Figures of one run: `exchange_until`, how much crossed before a loss was reached, and `end`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from csipipe.files import DAMAGED
from csipipe.tracking import HISTORY

Unit = Literal["scalars", "bytes"]
REMEDY = "move the folder away and start the report again, which then trains the run again"
LAST = 3
"""Evaluations that make up the end of a curve: at a constant rate, a single one scatters."""


@dataclass(frozen=True)
class Curve:
    """A run's evaluations in order; exchange in training, over all UEs and both directions.

    Attributes:
        iterations: after how many each was made.
        scalars, bytes: exchanged until then.
        loss: the paper's test loss, mean over UEs; `per_ue` by evaluation and UE.
        nmse_db: centred NMSE in dB.
        holdout: loss on held-out training rows; None where there are none.
        floor: test loss of a constant 0.5.
    """

    iterations: list[int]
    scalars: list[int]
    bytes: list[int]
    loss: list[float]
    per_ue: list[list[float]]
    nmse_db: list[float]
    holdout: list[float | None]
    floor: float

    def exchange_until(self, loss: float, unit: Unit = "scalars") -> float | None:
        """Exchanged until the test loss first fell to `loss`, interpolated linearly between
        evaluations; at the first evaluation if it was already there; None if it never was."""
        exchanged: list[int] = getattr(self, unit)
        for i, value in enumerate(self.loss):
            if value <= loss:
                if i == 0:
                    return float(exchanged[0])
                before = self.loss[i - 1]
                part = (before - loss) / (before - value)
                return exchanged[i - 1] + part * (exchanged[i] - exchanged[i - 1])
        return None

    def loss_at(self, scalars: float) -> float:
        """Lowest test loss reached with at most `scalars` exchanged; the floor before any."""
        seen = [v for v, x in zip(self.loss, self.scalars, strict=True) if x <= scalars]
        return min(seen, default=self.floor)

    @property
    def lowest(self) -> float:
        """The lowest test loss of all evaluations."""
        return min(self.loss)

    @property
    def end(self) -> float:
        """Test loss at the end: mean of the last evaluations."""
        last = self.loss[-LAST:]
        return sum(last) / len(last)

    @property
    def spread(self) -> float:
        """Highest minus lowest UE's test loss at the end: mean of the last evaluations."""
        last = [max(ues) - min(ues) for ues in self.per_ue[-LAST:]]
        return sum(last) / len(last)


def read(folder: Path) -> Curve:
    """The curve of the finished run in `folder`.

    Raises:
        ValueError: the folder is damaged; names the file, what is wrong and the remedy.
    """
    [summary] = _json(folder / "summary.json", whole=True)
    file = folder / HISTORY
    if not file.is_file():
        raise ValueError(f"{file} is missing, but the run is finished; {REMEDY}.")
    lines = _json(file)
    looked_at = file
    try:
        curve = _curve(lines)
        looked_at = folder / "summary.json"
        finished, loss = int(summary["iterations"]), float(summary["test"]["loss"])
    except DAMAGED as error:
        raise ValueError(
            f"{looked_at}: a figure is missing or of the wrong type ({error}); {REMEDY}."
        ) from error
    for before, after in pairwise(curve.iterations):
        if after <= before:
            raise ValueError(f"{file} has iteration {after} after {before}; {REMEDY}.")
    if (curve.iterations[-1], curve.loss[-1]) != (finished, loss):
        raise ValueError(
            f"{file} ends at iteration {curve.iterations[-1]} with test loss {curve.loss[-1]:.6g}, "
            f"summary.json at {finished} with {loss:.6g}; {REMEDY}."
        )
    return curve


def _curve(lines: list[dict[str, Any]]) -> Curve:
    def exchanged(unit: Unit) -> list[int]:
        return [sum(line["exchanged"][unit][way] for way in ("up", "down")) for line in lines]

    return Curve(
        iterations=[int(line["iteration"]) for line in lines],
        scalars=exchanged("scalars"),
        bytes=exchanged("bytes"),
        loss=[float(line["test"]["loss"]) for line in lines],
        per_ue=[[float(ue["loss"]) for ue in line["test"]["per_ue"]] for line in lines],
        nmse_db=[float(line["test"]["nmse_db"]) for line in lines],
        holdout=[
            None if line["holdout"] is None else float(line["holdout"]["loss"]) for line in lines
        ],
        floor=float(lines[-1]["test"]["floor_loss"]),
    )


def _json(file: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The objects of a file, one per line or one in all (ValueError)."""
    found = []
    where = ""
    try:
        text = file.read_text()
        for number, part in enumerate([text] if whole else text.splitlines(), 1):
            where = "" if whole else f", line {number}"
            found.append(json.loads(part))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}{where} isn't JSON ({error}); {REMEDY}.") from error
    for number, read in enumerate(found, 1):
        if not isinstance(read, dict):
            where = "" if whole else f", line {number}"
            raise ValueError(f"{file}{where} isn't an object; {REMEDY}.")
    return found
