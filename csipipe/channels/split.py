"""Which rows of which environment each UE trains on, and which ones all are tested on.

Arithmetic only. Rows are assigned as contiguous ranges of a source's ordered stream, so no row
goes to two UEs and a UE asks only for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from csipipe.channels.source import SITES, Part, Site, Span
from csipipe.settings.config import DataSettings
from csipipe.settings.tables import SOURCES

ALL, NONIID = "all", "noniid"
"""What data.environment may be besides the name of an environment."""
_TRIES = 1000
Available = Callable[[Site, Part], int | None]


@dataclass(frozen=True)
class Deal:
    """The rows of every UE and the common test set."""

    ues: tuple[tuple[Span, ...], ...]
    """Per UE the spans it trains on, one per environment; empty ones are left out."""
    test: tuple[Span, ...]
    """Spans of the test set, one per environment."""


def deal(
    data: DataSettings, ues: int, available: Available, environments: Sequence[Site] = SITES
) -> Deal:
    """Assign rows to UEs.

    Of R rows, each of N UEs gets R // N, the first R % N one more. In the paper's mixture `noniid`,
    half of the rows are of the first environment and half of the second, and UE n's share of the
    first is (2(N-n)-1) / (2N): 9.5 of 10 for the first of ten UEs, 0.5 of 10 for the last. With
    data.alpha, every environment's rows are divided among the UEs by shares drawn from a symmetric
    Dirichlet distribution of that parameter, so that UEs have different numbers of rows, too.
    `all` divides every environment equally; environments called ue-0, ue-1 … belong to these UEs.

    Args:
        data: environment, sample counts, alpha and seed.
        ues: number of UEs N, at least 1.
        available: rows of an environment and part; None if there is no limit.
        environments: what the source has.

    Raises:
        ValueError: more rows requested than available, fewer training rows than UEs, or UEs that
            aren't those of the data.
    """
    train = _rows_per_site(data, "train", available, environments)
    total = sum(train.values())
    if total < ues:
        raise ValueError(
            f"{total} training row(s) for {ues} UEs; each needs at least one. Raise "
            "data.train_samples (or add data) or lower topology.ues."
        )
    if data.where == ALL and owners(environments):
        per_site = _own(train, ues)
    elif data.where == NONIID and data.alpha is not None:
        per_site = _drawn(train, ues, data.alpha, data.seed)
    elif data.where == NONIID:
        sizes = [total // ues + (ue < total % ues) for ue in range(ues)]
        first, second = train
        ours = _falling_counts(train[first], ues)
        others = [size - own for size, own in zip(sizes, ours, strict=True)]
        assert min(others) >= 0  # a share is at most (2N-1) / 2N of a UE's rows
        per_site = {first: ours, second: others}
    else:
        per_site = {}
        given = 0  # the ones more go on where the last environment's ended
        for site, rows in train.items():
            per_site[site] = [rows // ues + ((ue - given) % ues < rows % ues) for ue in range(ues)]
            given += rows
    spans = [_spans(site, counts) for site, counts in per_site.items()]
    return Deal(
        ues=tuple(_without_empty(own) for own in zip(*spans, strict=True)),
        test=common_test(data, available, environments),
    )


def common_test(
    data: DataSettings, available: Available, environments: Sequence[Site] = SITES
) -> tuple[Span, ...]:
    """Spans of the test set, which needs no training rows; raises as `deal`."""
    test = _rows_per_site(data, "test", available, environments)
    return _without_empty(tuple(Span(site, "test", 0, count) for site, count in test.items()))


def _chosen(data: DataSettings, environments: Sequence[Site]) -> tuple[Site, ...]:
    """The environments that the settings name (ValueError)."""
    if data.where == ALL:
        return tuple(environments)
    if data.where == NONIID:
        if data.alpha is None and len(environments) != 2:
            raise ValueError(
                "data.environment is noniid, the paper's mixture of two environments; the data "
                f"has {', '.join(environments)}. Set data.alpha, for example to 0.5, for a "
                "mixture of any number."
            )
        return tuple(environments)
    if data.where not in environments:
        several = f", {ALL}, {NONIID}" if len(environments) > 1 else ""
        raise ValueError(
            f"data.environment is {data.where}; the data has {', '.join(environments[:20])}. "
            f"Set it to one of them{several}."
        )
    return (data.where,)


def _rows_per_site(
    data: DataSettings, part: Part, available: Available, environments: Sequence[Site]
) -> dict[Site, int]:
    """Rows to use per environment; of an odd number in a mixture, the first gets one more."""
    sites = _chosen(data, environments)
    found = {site: available(site, part) for site in sites}
    asked = data.train_samples if part == "train" else data.test_samples
    limits = {site: rows for site, rows in found.items() if rows is not None}
    equal = data.where == NONIID and data.alpha is None
    if limits and not equal:  # as many of each as there are, or in these proportions
        return _proportional(part, asked, limits)
    if asked is None:
        asked = min(limits.values()) * len(sites) if limits else _usual(data, part)
    wanted = {site: (asked + len(sites) - 1 - i) // len(sites) for i, site in enumerate(sites)}
    for site, rows in wanted.items():
        if site in limits and rows > limits[site]:
            raise ValueError(
                f"data.{part}_samples is {asked}, which takes {rows} {site} rows; the data has "
                f"{limits[site]}. Set it to {min(limits.values()) * len(sites)}"
                " at most, or leave it null to use all rows."
            )
    return wanted


def _proportional(part: Part, asked: int | None, limits: dict[Site, int]) -> dict[Site, int]:
    total = sum(limits.values())
    if asked is None:
        return limits
    if asked > total:
        names = ", ".join(limits)
        raise ValueError(
            f"data.{part}_samples is {asked}, which takes {asked} {names} rows; the data has "
            f"{total}. Set it to {total} at most, or leave it null to use all rows."
        )
    upto = [asked * rows // total for rows in accumulate(limits.values(), initial=0)]
    return {site: stop - start for site, (start, stop) in zip(limits, pairwise(upto), strict=True)}


def owners(environments: Sequence[Site]) -> bool:
    """Whether the environments are UEs: ue-0, ue-1 …"""
    return set(environments) == {own_environment(ue) for ue in range(len(environments))}


def own_environment(ue: int) -> Site:
    """The environment whose rows are all a UE's own."""
    return f"ue-{ue}"


def _own(train: dict[Site, int], ues: int) -> dict[Site, list[int]]:
    if len(train) != ues:
        raise ValueError(
            f"topology.ues is {ues}; the data has a file for each of {len(train)} UEs. Set "
            f"topology.ues to {len(train)}, or data.environment to the rows of one."
        )
    return {
        own_environment(ue): [train[own_environment(ue)] * (ue == other) for other in range(ues)]
        for ue in range(ues)
    }


def _drawn(train: dict[Site, int], ues: int, alpha: float, seed: int) -> dict[Site, list[int]]:
    """Rows of each environment and UE, by Dirichlet shares; every UE has a row at least."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, ues, len(train))))
    for _ in range(_TRIES):
        found = {}
        for site, rows in train.items():
            upto = np.rint(rows * rng.dirichlet(np.full(ues, alpha)).cumsum()[:-1])
            edges = [0, *(int(edge) for edge in upto), rows]
            found[site] = [stop - start for start, stop in pairwise(edges)]
        if all(any(counts[ue] for counts in found.values()) for ue in range(ues)):
            return found
    raise ValueError(
        f"data.alpha is {alpha}: in {_TRIES} draws some of {ues} UEs always had no row of "
        f"{sum(train.values())}. Raise it, or lower topology.ues."
    )


def _usual(data: DataSettings, part: Part) -> int:
    """Default number of rows of an endless source."""
    source = SOURCES[data.source]
    usual = source.train_samples if part == "train" else source.test_samples
    assert usual is not None, f"{data.source} is endless and has no default number of rows"
    return usual


def _falling_counts(rows: int, ues: int) -> list[int]:
    """Rows of the first environment for each UE.

    The shares of UEs 0 … n-1 add up to (2Nn - n^2) / N^2 of them. Rounding that sum,
    not each share, makes the total exact.
    """
    upto = [
        (2 * rows * n * (2 * ues - n) + ues**2) // (2 * ues**2)  # + ues^2: round to nearest
        for n in range(ues + 1)
    ]
    return [stop - start for start, stop in pairwise(upto)]


def _spans(site: Site, counts: list[int]) -> list[Span]:
    edges = accumulate(counts, initial=0)
    return [Span(site, "train", start, stop) for start, stop in pairwise(edges)]


def _without_empty(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    return tuple(span for span in spans if span.size)
