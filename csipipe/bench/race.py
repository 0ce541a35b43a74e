"""Rounds in which every candidate runs in turn, so that a noisy machine hits all alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csipipe.bench import memory
from csipipe.bench.candidates import OTHER_NORMS, Candidate
from csipipe.bench.conductor import CandidateFailed, Conductor, Resident, Turn
from csipipe.bench.rank import Order
from csipipe.files import add_line

_SPARE = 2**30
"""Bytes that must stay free beside all candidates if they may keep their memory asleep."""
_SETTLING = 2
"""Iterations until all fresh memory is faulted in: on a virtual machine the first may take three
times as long as later ones, and the second a third longer."""
COMPARED = 5
"""How many of the first iterations are compared: later losses drift apart by rounding alone."""
TOLERANCE = 1e-4
"""Largest relative difference of a UE's loss between candidates that do the same arithmetic.

One model with one and with two threads differs by as much in its gradients.
"""
CROWDED = (
    "there isn't enough memory for all at once: each returns its own after its turn, and runs "
    f"{_SETTLING} untimed iterations before the timed ones"
)


@dataclass
class Race:
    """Candidates, and what they have measured so far.

    Attributes:
        iterations: how many each runs in a turn.
        same: whether all should do the same arithmetic; if so, losses are compared.
        crowded: there isn't enough memory for all at once, so each returns its own after its turn
            and runs untimed iterations first.
        rounds: timed rounds; in each, the turn of every remaining candidate.
        losses: the paper's loss per iteration and UE, by candidate.
        beside: the largest relative difference found, by candidate.
        failures: why a candidate can't continue, by candidate.
        parts: first tail layer of every stage, then the number of layers, by candidate.
    """

    candidates: Sequence[Candidate]
    iterations: int = 1
    same: bool = True
    crowded: bool = False
    rounds: list[dict[str, Turn]] = field(default_factory=list)
    losses: dict[str, list[list[float]]] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[int]] = field(default_factory=dict)
    _residents: dict[str, Resident] = field(default_factory=dict)
    _done: int = 0

    @property
    def reference(self) -> str | None:
        """Label of the candidate that the others' losses are compared with."""
        fit = (c.label for c in self.candidates if c.name not in OTHER_NORMS)
        return next((label for label in fit if label not in self.failures), None)

    def start(self, conductor: Conductor) -> None:
        """Start all; candidates after ours cut the tail where ours does."""
        parts: dict[int, list[int]] = {}
        waiting = []
        for candidate in self.candidates:
            stages = candidate.settings.stages
            resident = conductor.start(candidate, parts.get(stages))
            self._residents[candidate.label] = resident
            if candidate.name == "ours" and stages not in parts and self.same:
                self._wait_for(resident)
                if candidate.label in self.parts:
                    parts[stages] = self.parts[candidate.label]
            else:
                waiting.append(resident)
        for resident in waiting:
            self._wait_for(resident)

    def _wait_for(self, resident: Resident) -> None:
        """Wait until a candidate is built, and note where it cuts the tail, if it does."""
        label = resident.candidate.label
        try:
            parts = resident.built()
        except CandidateFailed as error:
            self._fail(label, str(error))
            return
        if parts is not None:
            self.parts[label] = parts

    def warm_up(self, available: int | None = None) -> dict[str, Turn]:
        """Untimed rounds, which measure the memory that each needs and allocate it if it may stay.

        Args:
            available: bytes of memory for all candidates; None: unlimited.
        """
        turns = self._round(Order(self.iterations, release=True))
        peaks = sum(peak or 0 for turn in turns.values() for peak in turn.peak_bytes)
        self.crowded = available is not None and peaks > available - _SPARE
        return turns if self.crowded else self._round(self._order(untimed=_SETTLING - 1))

    def practise(self) -> dict[str, Turn]:
        """An untimed round."""
        return self._round(self._order())

    def _order(self, untimed: int = 0) -> Order:
        untimed = _SETTLING if self.crowded else untimed
        return Order(self.iterations, untimed=untimed, release=self.crowded)

    def round(self) -> dict[str, Turn]:
        """One timed round."""
        turns = self._round(self._order())
        self.rounds.append(turns)
        return turns

    def _round(self, order: Order) -> dict[str, Turn]:
        labels = list(self._residents)
        first = self._done % max(1, len(labels))  # so that nobody always follows the same candidate
        turns = {}
        for label in labels[first:] + labels[:first]:
            try:
                turns[label] = self._residents[label].turn(order)
            except CandidateFailed as error:
                self._fail(label, str(error))
                continue
            self.losses.setdefault(label, []).extend(turns[label].losses)
        self._done += 1
        if self.same:
            self._compare()
        return {
            label: turns[label] for label in labels if label in turns and label in self._residents
        }

    def _compare(self) -> None:
        """End a candidate that computes something else: its times mean nothing."""
        reference = self.reference
        if reference is None or reference not in self.losses:
            return
        for candidate in self.candidates:
            label = candidate.label
            if label not in self._residents or candidate.name in OTHER_NORMS:
                continue
            found = difference(self.losses[label], self.losses[reference])
            self.beside[label] = found
            if not found <= TOLERANCE:
                self._residents[label].end(patience=0)
                self._fail(
                    label,
                    f"{label} doesn't compute the same as {reference}: a UE's loss differs by "
                    f"{found:.1e} (relative) within the first {COMPARED} iterations; at most "
                    f"{TOLERANCE:.0e} is allowed. It is not timed.",
                )
                for turns in self.rounds:
                    turns.pop(label, None)

    def _fail(self, label: str, why: str) -> None:
        self.failures[label] = why
        self._residents.pop(label, None)

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Seconds per iteration of every candidate, round by round."""
        return {
            candidate.label: times
            for candidate in self.candidates
            if (times := [turn.seconds for turn in self.turns_of(candidate)])
        }

    def turns_of(self, candidate: Candidate) -> list[Turn]:
        """A candidate's turns in the timed rounds."""
        label = candidate.label
        return [turns[label] for turns in self.rounds if label in turns]

    def ratios(self, over: str, under: str) -> list[float]:
        """Seconds of one over seconds of another, round by round."""
        return [
            turns[over].seconds / turns[under].seconds
            for turns in self.rounds
            if over in turns and under in turns
        ]


def difference(found: list[list[float]], wanted: list[list[float]]) -> float:
    """Largest relative difference of a UE's loss over the first iterations; inf if not finite."""
    pairs = list(zip(found[:COMPARED], wanted[:COMPARED], strict=False))
    ratios = [
        abs(a - b) / abs(b) if b else math.inf
        for mine, theirs in pairs
        for a, b in zip(mine, theirs, strict=True)
    ]
    return max((r if math.isfinite(r) else math.inf for r in ratios), default=0.0)


def run(
    race: Race,
    rounds: int,
    record: Path | None = None,
    say: Callable[[str], None] = print,
    conductor: Conductor | None = None,
) -> None:
    """Start the candidates, warm up, and time `rounds` rounds; at the end none is left.

    Args:
        record: file that each round is appended to as it ends, one JSON object per line.
        say: takes a line about the progress.
        conductor: starts them; None: one that starts programs.
    """
    if record is not None:
        record.write_text("")
    room = memory.available()
    with conductor or Conductor() as conductor:
        say(f"starting {', '.join(c.label for c in race.candidates)}")
        race.start(conductor)
        race.warm_up(room)
        if race.crowded:
            say(CROWDED)
        for number in range(rounds):
            turns = race.round()
            line = {label: turn.seconds for label, turn in turns.items()}
            say(
                f"round {number + 1}/{rounds}: "
                + ", ".join(f"{k} {v:.3f} s" for k, v in line.items())
            )
            if record is not None:
                add_line(record, json.dumps({"round": number, "seconds": line}))
