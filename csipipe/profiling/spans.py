"""What a rank did when: spans of time, and their figures. No tensors, no processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Span:
    """One thing that a rank did, as reported to its clock (`csipipe.measure.clock`).

    Attributes:
        activity: compute, send or wait.
        what: what was done, such as `forward`.
        number: the micro-batch or UE that it was done to.
        iteration: counted from 1.
        begin, end: nanoseconds since 1970, by the rank's own clock unless shifted.
    """

    activity: str
    what: str
    number: int | None
    iteration: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        """Name of its range in a trace."""
        return range_name(self.what, self.number)

    def shifted(self, ns: int) -> Span:
        """The same, `ns` later."""
        return replace(self, begin=self.begin + ns, end=self.end + ns)


def range_name(what: str, number: int | None) -> str:
    """`forward 3`."""
    return what if number is None else f"{what} {number}"


@dataclass(frozen=True)
class Row:
    """One rank's spans, in order, on rank 0's clock."""

    role: str
    spans: list[Span]

    def of(self, iteration: int) -> Row:
        """The spans of one iteration."""
        return Row(self.role, [span for span in self.spans if span.iteration == iteration])


def to_json(spans: Sequence[Span]) -> str:
    """One line of ASCII."""
    return json.dumps([astuple(span) for span in spans])


def from_json(text: str) -> list[Span]:
    """What `to_json` wrote."""
    return [Span(*values) for values in json.loads(text)]


def idle(row: Row) -> float:
    """Share of a rank's iterations, each from first to last span, in which it doesn't compute."""
    busy = sum(span.end - span.begin for span in row.spans if span.activity == "compute")
    iterations = [row.of(i).spans for i in {span.iteration for span in row.spans}]
    whole = sum(spans[-1].end - spans[0].begin for spans in iterations)
    return 1 - busy / whole if whole else 0.0


def typical(rows: Sequence[Row]) -> int:
    """The iteration of median length, from the first rank that begins it to the last that ends."""
    iterations = sorted({span.iteration for row in rows for span in row.spans})

    def length(iteration: int) -> int:
        spans = [span for row in rows for span in row.spans if span.iteration == iteration]
        return max(span.end for span in spans) - min(span.begin for span in spans)

    return sorted(iterations, key=length)[(len(iterations) - 1) // 2]
