"""Evaluations as text: per UE, over samples, and runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from csipipe.evaluation.summary import PERCENTILES, SHOWN, Evaluated
from csipipe.models import widths
from csipipe.plotting import name_of
from csipipe.tracking import ceiling_note

_HEADS = {"loss": "loss", "nmse_db": "NMSE (dB)", "rho": "ρ", "sgcs": "SGCS"}
_FORMS = {"loss": ".3e", "nmse_db": ".2f", "rho": ".4f", "sgcs": ".4f"}


def of_run(evaluated: Evaluated, best: tuple[float, float] | None) -> str:
    """One run: every UE, their mean, floor and PCA, and percentiles.

    Args:
        best: ρ and SGCS of the images themselves; None: there are none.
    """
    mean = evaluated.mean()
    floor = {"loss": mean["floor_loss"], "nmse_db": 0.0, "rho": None, "sgcs": None}
    width = max(10, *(len(f"UE {row['ue']}") for row in evaluated.per_ue()))
    lines = [_line("", _HEADS, width)]
    lines += [_row(f"UE {row['ue']}", row, width) for row in evaluated.per_ue()]
    lines += [
        _row("mean", mean, width),
        _row("0.5", floor, width) + "   a constant 0.5: the floor",
        *_images(best, width),
        *_pca(evaluated, width),
        "",
        _line("percentile", {p: f"{p} %" for p in PERCENTILES}, width) + "   of all UEs' samples",
    ]
    for name, values in evaluated.distribution().items():
        cells = {p: _cell(name, values[f"p{p}"]) for p in PERCENTILES}
        lines.append(_line(_HEADS[name], cells, width))
    return "\n".join(lines)


def side_by_side(runs: Sequence[tuple[str, Evaluated]]) -> str:
    """A line per run: what it is, its mean figures, and the UEs' NMSE from best to worst.

    The table is wide: models are named only where they differ.
    """
    names = [evaluated.run.settings.model.name for _, evaluated in runs]
    words = ["run", "method", *(["model"] if len(set(names)) > 1 else [])]
    head = [*words, "c1", "c2", "UEs", "iteration", *_HEADS.values(), "best … worst UE", "PCA (dB)"]
    cells = [head]
    for name, evaluated in runs:
        mean = evaluated.mean()
        up, down = widths(evaluated.run.settings.model)
        ues = [row["nmse_db"] for row in evaluated.per_ue()]
        band = "—" if None in ues else f"{min(ues):.2f} … {max(ues):.2f}"
        cells.append(
            [
                name,
                name_of(evaluated.run.settings.method),
                *([evaluated.run.settings.model.name] if "model" in words else []),
                str(up),
                str(down),
                str(len(ues)),
                str(evaluated.run.iteration or evaluated.run.source.name),
                *(_cell(figure, mean[figure]) for figure in SHOWN),
                band,
                _pca_cell(evaluated),
            ]
        )
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < len(words) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in cells
    )


def _pca_cell(evaluated: Evaluated) -> str:
    """Its NMSE, or why there is none, as `channels check` says it."""
    if evaluated.pca is None:
        return "—"
    found = evaluated.pca.nmse_db
    return "too few rows" if found is None else f"{found:.2f}"


def _pca(evaluated: Evaluated, width: int) -> list[str]:
    """The line of the PCA that the run is compared with, if there is one."""
    if evaluated.pca is None:
        return []
    figures = dict.fromkeys(SHOWN) | {"nmse_db": evaluated.pca.nmse_db}
    note = ceiling_note(asdict(evaluated.pca))
    if evaluated.run.elsewhere and evaluated.pca.nmse_db is not None:
        note = f"of the run's own {evaluated.pca.rows:,} training rows"
    return [_row(f"PCA-{evaluated.pca.components}", figures, width) + f"   {note}"]


def _images(best: tuple[float, float] | None, width: int) -> list[str]:
    """The line of the images themselves, where it says anything."""
    if best is None:
        return []
    figures = {"loss": 0.0, "nmse_db": None, "rho": best[0], "sgcs": best[1]}
    return [_row("H", figures, width) + "   the images themselves: best possible ρ and SGCS"]


def _row(name: str, figures: dict[str, Any], width: int) -> str:
    return _line(name, {key: _cell(key, figures[key]) for key in SHOWN}, width)


def _line(name: str, cells: dict[Any, str], width: int) -> str:
    return f"{name:>{width}}" + "".join(f"  {cell:>10}" for cell in cells.values())


def _cell(name: str, value: float | None) -> str:
    return "—" if value is None else f"{value:{_FORMS[name]}}"
