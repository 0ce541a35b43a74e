"""How cost and memory grow with the number of UEs, on the same ranks.

The rows of a micro-batch over all UEs stay the same, so the number of micro-batches grows with the
UEs. What a stage holds then depends on the micro-batches in flight, that is on the schedule, and
not on the number of UEs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from csipipe.bench.candidates import Candidate, line_up
from csipipe.bench.race import Race
from csipipe.bench.table import spread
from csipipe.pipeline.schedule import bubble
from csipipe.settings.config import Settings

UES = (2, 4, 8, 16, 32, 64)
BASE = 4
"""The number of UEs that the others are compared with."""


def candidates(settings: Settings, ue_ranks: int, ues: Sequence[int] = UES) -> list[Candidate]:
    """Ours with 2 … 64 UEs.

    train.micro_batches is the number at `BASE` UEs.

    Raises:
        ValueError: a mini-batch that can't be cut into as many micro-batches.
    """
    found = []
    for n in ues:
        micro_batches, rest = divmod(settings.train.micro_batches * n, BASE)
        if rest or settings.train.batch_size % max(1, micro_batches):
            most = settings.train.micro_batches * max(ues) // BASE
            raise ValueError(
                f"--growth keeps the rows of a micro-batch over all UEs, so {n} UEs need "
                f"train.micro_batches {settings.train.micro_batches} × {n}/{BASE}, which must be "
                f"whole and divide train.batch_size {settings.train.batch_size}; for example "
                f"--train.micro_batches {BASE} --train.batch_size {most * BASE}."
            )
        grown = replace(
            settings,
            topology=replace(settings.topology, ues=n),
            train=replace(settings.train, micro_batches=micro_batches),
        )
        [ours] = line_up(grown, min(ue_ranks, n), ["ours"], ["ours"])
        found.append(replace(ours, label=f"{n} UEs"))
    return found


def per_sample(race: Race, candidate: Candidate) -> list[float]:
    """Seconds per sample, round by round."""
    samples = candidate.settings.topology.ues * candidate.settings.train.batch_size
    return [seconds / samples for seconds in race.seconds.get(candidate.label, [])]


def table(race: Race) -> str:
    """Cost per sample, beside `BASE` UEs' in the same round, and what each BTS rank holds."""
    lines = [
        f"{'':>8}  {'micro-':>8}  {'bubble':>7}  {'ms per sample':>24}  {'beside':>7}  "
        "most memory of each BTS rank in training (MB)",
        f"{'':>8}  {'batches':>8}  {'':>7}  {'q1    median        q3':>24}  {f'{BASE} UEs':>7}  "
        "(in parentheses: more than before the first iteration)",
    ]
    base = next((per_sample(race, c) for c in race.candidates if c.label == f"{BASE} UEs"), [])
    for candidate in race.candidates:
        cost = per_sample(race, candidate)
        if not cost:
            continue
        s = spread([1e3 * value for value in cost])
        beside = [a / b for a, b in zip(cost, base, strict=False)]
        ratio = f"{statistics.median(beside):>7.2f}" if beside else f"{'':>7}"
        m = candidate.settings.train.micro_batches
        lines.append(
            f"{candidate.label:>8}  {m:>8}  {bubble(candidate.settings.stages, m):>7.1%}  "
            f"{s['q1']:>8.3f}{s['median']:>8.3f}{s['q3']:>8.3f}  {ratio}  "
            f"{_memory(race, candidate)}"
        )
    return "\n".join(lines)


def _memory(race: Race, candidate: Candidate) -> str:
    """Of each BTS rank, over all rounds."""
    turns = race.turns_of(candidate)
    found = []
    for stage in range(candidate.settings.stages):
        peaks = [peak for t in turns if (peak := t.peak_bytes[stage]) is not None]
        base = turns[0].base_bytes[stage]
        if not peaks or base is None:
            return "unknown on this system"
        found.append(f"{max(peaks) / 1e6:.0f} (+{(max(peaks) - base) / 1e6:.0f})")
    return ", ".join(found)
