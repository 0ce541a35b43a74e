"""Which rows of which environment each UE trains on, and which ones all are tested on.

Arithmetic only. Rows are assigned as contiguous ranges of a source's ordered stream, so no row
goes to two UEs and a UE asks only for its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from csipipe.channels.source import Part, Site, Span
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import SOURCES

Available = Callable[[Site, Part], int | None]


@dataclass(frozen=True)
class Deal:
    """The rows of every UE and the common test set."""

    ues: tuple[tuple[Span, ...], ...]
    """Per UE the spans it trains on: one, or indoor and outdoor."""
    test: tuple[Span, ...]
    """Spans of the test set: one, or indoor and outdoor."""

    def train(self, ue: int) -> tuple[Span, ...]:
        """Spans that a UE, counted from 0, trains on; empty ones are left out."""
        return self.ues[ue]


def deal(data: DataSettings, ues: int, available: Available) -> Deal:
    """Assign rows to UEs.

    Of R rows, each of N UEs gets R // N, the first R % N one more. In the mixture `noniid`,
    half of the rows are indoor and half outdoor, and UE n's indoor share is
    (2(N-n)-1) / (2N): 9.5 of 10 for the first of ten UEs, 0.5 of 10 for the last. The test set
    is also half and half.

    Args:
        data: environment and sample counts.
        ues: number of UEs N, at least 1.
        available: rows of an environment and part; None if there is no limit.

    Raises:
        ValueError: more rows requested than available, or fewer training rows than UEs.
    """
    train = _rows_per_site(data, "train", available)
    total = sum(train.values())
    if total < ues:
        raise ValueError(
            f"{total} training row(s) for {ues} UEs; each needs at least one. Raise "
            "data.train_samples (or add data) or lower topology.ues."
        )
    sizes = [total // ues + (ue < total % ues) for ue in range(ues)]
    if data.environment == "noniid":
        indoor = _indoor_counts(train["indoor"], ues)
        outdoor = [size - first for size, first in zip(sizes, indoor, strict=True)]
        assert min(outdoor) >= 0  # a share is at most (2N-1) / 2N of a UE's rows
        per_site: dict[Site, list[int]] = {"indoor": indoor, "outdoor": outdoor}
    else:
        per_site = {data.environment: sizes}
    spans = [_spans(site, counts) for site, counts in per_site.items()]
    return Deal(
        ues=tuple(_without_empty(own) for own in zip(*spans, strict=True)),
        test=common_test(data, available),
    )


def common_test(data: DataSettings, available: Available) -> tuple[Span, ...]:
    """Spans of the test set, which needs no training rows; raises as `deal`."""
    test = _rows_per_site(data, "test", available)
    return _without_empty(tuple(Span(site, "test", 0, count) for site, count in test.items()))


def _rows_per_site(data: DataSettings, part: Part, available: Available) -> dict[Site, int]:
    """Rows to use per environment; of an odd number in the mixture, indoor gets one more."""
    sites: tuple[Site, ...] = (
        ("indoor", "outdoor") if data.environment == "noniid" else (data.environment,)
    )
    found = {site: available(site, part) for site in sites}
    asked = data.train_samples if part == "train" else data.test_samples
    if asked is None:
        limits = [rows for rows in found.values() if rows is not None]
        asked = min(limits) * len(sites) if limits else _usual(data, part)
    wanted = {site: (asked + len(sites) - 1 - i) // len(sites) for i, site in enumerate(sites)}
    for site, rows in wanted.items():
        limit = found[site]
        if limit is not None and rows > limit:
            raise ValueError(
                f"data.{part}_samples is {asked}, which takes {rows} {site} rows; the data has "
                f"{limit}. Set it to {min(r for r in found.values() if r is not None) * len(sites)}"
                " at most, or leave it null to use all rows."
            )
    return wanted


def _usual(data: DataSettings, part: Part) -> int:
    """Default number of rows of an endless source."""
    source = SOURCES[data.source]
    usual = source.train_samples if part == "train" else source.test_samples
    assert usual is not None, f"{data.source} is endless and has no default number of rows"
    return usual


def _indoor_counts(indoor: int, ues: int) -> list[int]:
    """Indoor rows of each UE.

    The shares of UEs 0 … n-1 add up to (2Nn - n^2) / N^2 of all indoor rows. Rounding that sum,
    not each share, makes the total exact.
    """
    upto = [
        (2 * indoor * n * (2 * ues - n) + ues**2) // (2 * ues**2)  # + ues^2: round to nearest
        for n in range(ues + 1)
    ]
    return [stop - start for start, stop in pairwise(upto)]


def _spans(site: Site, counts: list[int]) -> list[Span]:
    edges = accumulate(counts, initial=0)
    return [Span(site, "train", start, stop) for start, stop in pairwise(edges)]


def _without_empty(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    return tuple(span for span in spans if span.size)
