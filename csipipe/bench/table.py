"""What a benchmark prints and writes: tables as text, and one JSON object."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from csipipe.bench.candidates import OTHER_NORMS, Candidate, cores
from csipipe.bench.race import TOLERANCE, Race
from csipipe.device import processor
from csipipe.measure.clock import ACTIVITIES
from csipipe.models import widths
from csipipe.pipeline.schedule import bubble
from csipipe.settings.config import Settings


def spread(values: Sequence[float]) -> dict[str, float]:
    """`min`, `q1`, `median`, `q3`, `max`; quartiles include both ends, so a single value works."""
    q1, median, q3 = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {"min": min(values), "q1": q1, "median": median, "q3": q3, "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": cores(),
        "processor": processor(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def title(settings: Settings, ranks: int) -> str:
    """One line that says what was measured, and on what."""
    (up, down), train, here = widths(settings.model), settings.train, machine()
    return (
        f"{settings.topology.ues} UEs × {train.batch_size} samples, c1 {up}, c2 {down}, "
        f"{train.micro_batches} micro-batches, {settings.stages} BTS stage(s) and "
        f"{ranks - settings.stages} UE rank(s); {here['cores']} cores, torch {here['torch']}"
    )


def seconds_table(race: Race) -> str:
    """Seconds per iteration of every candidate, and how far its losses are from the reference."""
    lines = [f"{'seconds per iteration':>24}  {'min':>8}  {'median':>8}  {'max':>8}  losses"]
    for label, values in race.seconds.items():
        s = spread(values)
        figures = "".join(f"  {s[key]:>8.3f}" for key in ("min", "median", "max"))
        lines.append(f"{label:>24}{figures}  {_sameness(race, label)}")
    return "\n".join(lines)


def _sameness(race: Race, label: str) -> str:
    if label == race.reference:
        return "the reference for the others"
    if label not in race.beside:
        return "not compared: its BatchNorms see all rows at once"
    found = race.beside[label]
    return "the same, to the bit" if found == 0 else f"the same to {found:.0e}"


def ratio_table(race: Race) -> str:
    """Ours over every other candidate, taken round by round; empty without ours."""
    lines = [f"{'ours /':>24}  {'median':>8}  {'quartiles':>16}  {'min':>8}  {'max':>8}"]
    for label in race.seconds:
        if label != "ours" and (values := race.ratios("ours", label)):
            s = spread(values)
            quartiles = f"{s['q1']:.3f} … {s['q3']:.3f}"
            lines.append(
                f"{label:>24}  {s['median']:>8.3f}  {quartiles:>16}  {s['min']:>8.3f}  "
                f"{s['max']:>8.3f}"
            )
    return "\n".join(lines) if len(lines) > 1 else ""


def share_table(race: Race, candidate: Candidate) -> str:
    """Share of an iteration that each rank computes, sends, waits; empty without a clock."""
    mean = _spent(race, candidate)
    if not any(mean):
        return ""
    lines = [f"{candidate.label:>24}" + "".join(f"  {name:>8}" for name in ACTIVITIES)]
    for role, shares in zip(candidate.roles, mean, strict=True):
        lines.append(f"{role:>24}" + "".join(f"  {shares[a]:>7.1%} " for a in ACTIVITIES))
    stages, micro_batches = candidate.settings.stages, candidate.settings.train.micro_batches
    idle = bubble(stages, micro_batches)
    lines.append(f"{'bubble':>24}  {idle:.1%} of a stage's time, (S-1)/(M+S-1), at equal stages")
    return "\n".join(lines)


def _spent(race: Race, candidate: Candidate) -> list[dict[str, float]]:
    """Of each rank, the median over rounds of its shares; empty dictionaries without a clock."""
    turns = race.turns_of(candidate)
    if not turns or not all(turns[0].spent):
        return [{} for _ in range(candidate.ranks)]
    return [
        {
            activity: statistics.median(t.spent[rank][activity] / t.seconds for t in turns)
            for activity in ACTIVITIES
        }
        for rank in range(candidate.ranks)
    ]


def as_json(race: Race) -> dict[str, Any]:
    """Everything that was measured, and what it was measured with."""
    seconds = race.seconds
    found = {}
    for candidate in race.candidates:
        label = candidate.label
        last = race.rounds[-1].get(label) if race.rounds else None
        found[label] = {
            "name": candidate.name,
            "layers": candidate.layers,
            "ranks": candidate.ranks,
            "threads": candidate.threads,
            "settings": asdict(candidate.settings),
            "seconds": seconds.get(label, []),
            "compared": candidate.name not in OTHER_NORMS,
            "largest_relative_difference_of_losses": race.beside.get(label),
            "bubble": bubble(
                max(1, candidate.settings.stages), candidate.settings.train.micro_batches
            )
            if candidate.ranks > 1
            else None,
            "shares": dict(zip(candidate.roles, _spent(race, candidate), strict=True)),
            "base_bytes": last and dict(zip(candidate.roles, last.base_bytes, strict=True)),
            "peak_bytes": last and dict(zip(candidate.roles, last.peak_bytes, strict=True)),
            "failure": race.failures.get(label),
        }
    return {
        "machine": machine(),
        "iterations_per_turn": race.iterations,
        "crowded": race.crowded,
        "tolerance": TOLERANCE,
        "reference": race.reference,
        "candidates": found,
        "ours_over": {
            label: {"rounds": values, **spread(values)}
            for label in seconds
            if label != "ours" and (values := race.ratios("ours", label))
        },
    }
