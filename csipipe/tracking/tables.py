"""What a run prints at its end, and the exchange as in `summary.json`."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from csipipe.comm.ledger import BUFFERS, PAPER, UP, Kind, Ledger
from csipipe.settings.config import Settings

_HEADS = {"loss": "loss", "nmse_db": "NMSE (dB)", "sgcs": "SGCS"}
_HARDLY = -0.5
"""NMSE in dB; a run that ends above it is hardly better than a constant."""
_BY_HEART = 3.0
"""A run whose NMSE on training rows is so many dB below that on the test set has learnt its rows by
heart, or is tested on others: a UE whose own encoder has only seen its own place, for example."""
_FORMS = {"loss": "{:>10.3e}", "nmse_db": "{:>10.2f}", "sgcs": "{:>10.4f}"}


def exchanged(
    ledger: Ledger, kinds: tuple[Kind, ...], phase: str = "training"
) -> dict[str, dict[str, int]]:
    """`scalars` and `bytes`, each `up` and `down`, over all UEs."""
    up = ledger.total(phase, [kind for kind in kinds if kind in UP])
    down = ledger.total(phase, [kind for kind in kinds if kind not in UP])
    return {
        "scalars": {"up": up[0], "down": down[0]},
        "bytes": {"up": up[1], "down": down[1]},
    }


def exchanged_summary(ledger: Ledger) -> dict[str, dict[str, dict[str, int]]]:
    """Entries of `summary.json`: the paper's count, BatchNorm's statistics, evaluation."""
    return {
        "exchanged": exchanged(ledger, PAPER),
        "exchanged_buffers": exchanged(ledger, BUFFERS),
        "exchanged_evaluation": exchanged(ledger, PAPER, "evaluation"),
    }


def ceiling_note(pca: dict[str, Any]) -> str:
    """What a PCA (`csipipe.run.ceiling.Ceiling`, as a dict) is to the model beside it."""
    if pca["nmse_db"] is None:
        return f"{pca['rows']:,} training rows are too few: it takes more than 2 per component"
    of = f"of {pca['rows']:,} training rows"
    if pca["bound"]:
        return f"{of}: an estimate of this model's ceiling"
    return f"{of}: no bound, this model can beat it"


def test_table(test: dict[str, Any], pca: dict[str, Any] | None) -> str:
    """Figures on a test set, per UE and mean, with the floor (of `Figures.summary`) and a PCA."""
    shown = [name for name in _FORMS if name in test]
    floor = {"loss": test["floor_loss"], "nmse_db": 0.0, "sgcs": 0.0}
    rows = [*((f"UE {row['ue']}", row) for row in test["per_ue"]), ("mean", test), ("0.5", floor)]
    lines = ["  ".join([f"{'test set':>10}", *(f"{_HEADS[name]:>10}" for name in shown)])]
    for title, row in rows:
        lines.append("  ".join([f"{title:>10}", *(_FORMS[n].format(row[n]) for n in shown)]))
    lines[-1] += "   a constant 0.5: the floor"
    if pca is not None:
        cells = [
            _FORMS[n].format(pca[n]) if pca.get(n) is not None else f"{'—':>10}" for n in shown
        ]
        lines.append("  ".join([f"{'PCA-' + str(pca['components']):>10}", *cells]))
        lines[-1] += f"   {ceiling_note(pca)}"
    return "\n".join(lines)


def _earlier(summary: dict[str, Any]) -> list[str]:
    """That the last evaluation was before the last iteration."""
    at = summary["test_iteration"]
    return [] if at == summary["iterations"] else [f"after iteration {at}: the last evaluation"]


def _not_everyone(summary: dict[str, Any]) -> list[str]:
    """Which UEs the mean over the test set isn't over, and why."""
    ues, chosen = summary["topology"]["ues"], summary["evaluated_ues"]
    notes = []
    if len(chosen) < ues:
        notes.append(f"evaluated are {len(chosen):,} of the {ues:,} UEs (run.eval_ues)")
    shown = {row["ue"] for row in summary["test"]["per_ue"]}
    if missing := [ue for ue in chosen if ue not in shown]:
        which = f"UE{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        notes.append(f"the mean is without {which}, for bad values (train.on_bad_ue)")
    return notes


def _advice(summary: dict[str, Any], settings: Settings, training_db: float) -> list[str]:
    """What may help a finished run that has learnt its training rows by heart, or hardly anything;
    of eigenvectors, whose phases are free, NMSE doesn't say so, and where PCA does no better, only
    more rows help."""
    mean, pca = summary["test"]["nmse_db"], summary["ceiling"]
    beyond = pca is not None and pca["nmse_db"] is not None and pca["nmse_db"] > _HARDLY
    by_heart, hardly = training_db < mean - _BY_HEART, mean > _HARDLY
    if summary["status"] != "finished" or settings.similarity:
        return []
    if by_heart:
        remedy = _more_rows(settings, training_db)
        if not hardly:
            return [remedy]
    elif beyond or not hardly:
        return []
    elif settings.model.start == "pca":
        remedy = "a lower --train.lr"
    else:
        remedy = "more iterations"
        if _may_start_by_pca(settings):
            remedy += ", or --model.start pca --train.lr 1e-4"
    return [f"{'hardly' if mean < 0 else 'no'} better than the floor: {remedy}"]


def _more_rows(settings: Settings, training_db: float) -> str:
    """What may help a run that has learnt its training rows by heart."""
    spec = settings.spec
    own = spec.stages > 0 and "encoder" not in spec.shared and settings.topology.ues > 1
    remedies = ["more rows", "fewer UEs"] if own else ["more rows"]
    if settings.train.augment is None:
        remedies.append("--train.augment phase")
    which = " per UE" if own else ""
    return (
        f"training rows at {training_db:.1f} dB, too few{which} or unlike the test set's; "
        f"{', or '.join(remedies)}"
    )


def _may_start_by_pca(settings: Settings) -> bool:
    """Whether the same run could begin where PCA ends."""
    try:
        replace(settings, model=replace(settings.model, start="pca"))
    except ValueError:
        return False
    return settings.train.init is None


def closing_table(
    summary: dict[str, Any], settings: Settings, folder: Path, training_db: float = math.nan
) -> str:
    """What a run prints at its end.

    Args:
        training_db: NMSE in dB on the training rows of the last iteration; NaN: it isn't known.
    """
    lines = []
    if summary["test"]:
        notes = (
            *_earlier(summary),
            *_not_everyone(summary),
            *_advice(summary, settings, training_db),
        )
        lines = ["", test_table(summary["test"], summary["ceiling"])]
        lines += [f"{'':>10}  {note}" for note in notes]
    stopped = []
    if summary["status"] == "stopped":
        place = shlex.quote(str(folder))
        stopped = [f"stopped:      resume with the same command and --run.dir {place}"]
    lines += [
        "",
        *_exchange(summary),
        *_joined(summary),
        "",
        f"{summary['iterations']} iterations, {summary['seconds_per_iteration']:.3f} s per "
        "iteration (median), "
        f"{summary['seconds_total']:.0f} s in all",
        *stopped,
        f"run:          {folder}",
        f"look at it:   tensorboard --logdir {shlex.quote(str(folder))}",
    ]
    return "\n".join(lines)


def _exchange(summary: dict[str, Any]) -> list[str]:
    """What crossed in training, and whose messages were left out."""
    crossed = summary["exchanged"]
    lines = [f"{'exchanged':>10}  {'scalars':>14}  {'bytes':>14}   in training, all UEs"]
    for direction, meaning in (("up", "UE → BTS"), ("down", "BTS → UE")):
        lines.append(
            f"{direction:>10}  {crossed['scalars'][direction]:>14,}  "
            f"{crossed['bytes'][direction]:>14,}   {meaning}"
        )
    apart = summary["exchanged_buffers"]
    if any(apart["scalars"].values()):
        scalars, size = (sum(apart[unit].values()) for unit in ("scalars", "bytes"))
        lines.append(f"{'buffers':>10}  {scalars:>14,}  {size:>14,}   BatchNorm's, both ways")
    dropped = [f"UE {ue}: {times}" for ue, times in enumerate(summary["dropped"]) if times]
    if dropped:
        lines.append(f"{'left out':>10}  {', '.join(dropped)} iteration(s), for bad values")
    return lines


def _joined(summary: dict[str, Any]) -> list[str]:
    """When the newcomers had caught up."""
    lines = []
    for one in summary["joined"]:
        when = "isn't within 0.5 dB of the other UEs yet"
        if one["iterations"]:
            when = (
                f"within 0.5 dB of the other UEs at iteration {one['iterations']:,}: "
                f"{one['samples']:,} samples"
            )
            if one["bytes"] is not None:
                when += f", {one['bytes']:,} bytes exchanged"
        lines.append(f"{'joined':>10}  UE {one['ue']}: {when}")
    return lines
