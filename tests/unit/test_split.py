"""The deal of rows to UEs, the held-out rows, and the manifest that repeats them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from csifiles import SITES, csinet, images, save

from csipipe.channels import (
    Deal,
    Manifest,
    Span,
    deal,
    load_ue,
    manifest_of,
    open_source,
)
from csipipe.channels.load import check_values, rows_of
from csipipe.channels.source import Images, Kind, Part, Site
from csipipe.settings.config import DataSettings


def settings(**kwargs: Any) -> DataSettings:
    return DataSettings(**kwargs)


def endless(site: Site, part: Part) -> int | None:
    return None


def have(counts: dict[tuple[str, str], int]) -> Callable[[Site, Part], int | None]:
    return lambda site, part: counts[site, part]


def counts_of(dealt: Deal, site: Site, ues: int) -> list[int]:
    return [sum(s.size for s in dealt.ues[n] if s.environment == site) for n in range(ues)]


def test_the_papers_mixture() -> None:
    data = settings(environment="noniid", train_samples=130_000, test_samples=20_000)
    dealt = deal(data, 10, endless)
    shares = [12_350 - 1_300 * n for n in range(10)]
    assert counts_of(dealt, "indoor", 10) == shares
    assert shares[-1] == 650
    assert counts_of(dealt, "outdoor", 10) == shares[::-1]
    assert dealt.ues[1][0] == Span("indoor", "train", 12_350, 12_350 + 11_050)
    test = (Span("indoor", "test", 0, 10_000), Span("outdoor", "test", 0, 10_000))
    assert dealt.test == test


@pytest.mark.parametrize("environment", ["indoor", "outdoor", "noniid"])
def test_every_row_is_dealt_once(environment: Any) -> None:
    for ues in (1, 2, 3, 4, 7, 10, 13):
        for total in [*range(ues, 45), 999, 1000, 8000]:
            dealt = deal(settings(environment=environment, train_samples=total), ues, endless)
            sizes = [sum(span.size for span in dealt.ues[n]) for n in range(ues)]
            assert sizes == [total // ues + (n < total % ues) for n in range(ues)]
            for site in SITES:
                spans = [s for n in range(ues) for s in dealt.ues[n] if s.environment == site]
                assert all(s.size > 0 and s.part == "train" for s in spans)
                assert all(a.stop == b.start for a, b in pairwise(spans))
                assert not spans or spans[0].start == 0
            if environment == "noniid":
                indoor = counts_of(dealt, "indoor", ues)
                assert sum(indoor) == (total + 1) // 2
                shares = [(2 * (ues - n) - 1) / ues**2 for n in range(ues)]
                off = np.cumsum(indoor) - np.cumsum(shares) * sum(indoor)
                assert np.abs(off).max() < 0.5 + 1e-9


def test_dirichlet_shares_are_drawn_again_until_every_ue_has_a_row() -> None:
    data = settings(environment="noniid", train_samples=60, alpha=0.1)
    dealt = deal(data, 6, endless)
    # a run that resumes with another release must have the same
    assert counts_of(dealt, "indoor", 6) == [0, 3, 1, 2, 3, 21]
    assert counts_of(dealt, "outdoor", 6) == [1, 0, 3, 3, 0, 23]
    with pytest.raises(ValueError, match=r"in 1000 draws some of 60 UEs always had no row of 60"):
        deal(data, 60, endless)


def test_null_takes_what_there_is_and_evenly_in_the_mixture() -> None:
    counts = {("indoor", "train"): 80, ("outdoor", "train"): 30}
    counts |= {("indoor", "test"): 9, ("outdoor", "test"): 12}
    indoor = deal(settings(), 3, have(counts))
    assert counts_of(indoor, "indoor", 3) == [27, 27, 26]
    assert indoor.test == (Span("indoor", "test", 0, 9),)
    mixed = deal(settings(environment="noniid"), 3, have(counts))
    assert sum(counts_of(mixed, "indoor", 3)) == sum(counts_of(mixed, "outdoor", 3)) == 30
    assert [span.size for span in mixed.test] == [9, 9]


@pytest.mark.parametrize("ues", [2, 4])
def test_other_ues_than_have_files_of_their_own_are_refused(ues: int) -> None:
    sites = ["ue-0", "ue-1", "ue-2"]
    counts = {(site, part): 9 for site in sites for part in ("train", "test")}
    data = settings(source="files", path="x")
    assert [counts_of(deal(data, 3, have(counts), sites), s, 3) for s in sites[:1]] == [[9, 0, 0]]
    with pytest.raises(ValueError, match=f"topology.ues is {ues}; .* each of 3 UEs"):
        deal(data, ues, have(counts), sites)


def test_rows_of_several_environments_leave_no_ue_two_rows_behind_another() -> None:
    counts = {(site, "train"): rows for site, rows in zip("abc", (7, 6, 5), strict=True)}
    counts |= {(site, "test"): 1 for site in "abc"}
    dealt = deal(settings(source="files", path="x"), 4, have(counts), ["a", "b", "c"])
    found = [counts_of(dealt, site, 4) for site in "abc"]
    assert found == [[2, 2, 2, 1], [2, 1, 1, 2], [1, 2, 1, 1]]


def test_fewer_rows_than_there_are_come_from_environments_in_proportion() -> None:
    counts = {("a", "train"): 12, ("b", "train"): 6, ("a", "test"): 4, ("b", "test"): 8}
    data = settings(source="files", path="x", train_samples=9, test_samples=6)
    dealt = deal(data, 1, have(counts), ["a", "b"])
    assert [span.size for span in dealt.ues[0]] == [6, 3]
    assert [span.size for span in dealt.test] == [2, 4]


@pytest.mark.parametrize("environment", ["outdoor", "noniid"])
def test_synthetic_defaults(environment: Any) -> None:
    dealt = deal(settings(environment=environment), 4, endless)
    assert sum(span.size for n in range(4) for span in dealt.ues[n]) == 8000
    assert sum(span.size for span in dealt.test) == 1000


@pytest.mark.parametrize(
    ("kwargs", "ues", "message"),
    [
        ({"train_samples": 51}, 2, r"train_samples is 51, .* 51 indoor rows; the data has 50"),
        ({"test_samples": 21}, 2, r"test_samples is 21, .* 21 indoor rows; the data has 20"),
        (
            {"environment": "noniid", "train_samples": 62},
            2,
            r"train_samples is 62, .* 31 outdoor rows; the data has 30. Set it to 60 at most",
        ),
        ({"train_samples": 3}, 4, r"3 training row\(s\) for 4 UEs"),
    ],
)
def test_too_few_rows(kwargs: dict[str, Any], ues: int, message: str) -> None:
    counts = {("indoor", "train"): 50, ("outdoor", "train"): 30}
    counts |= {("indoor", "test"): 20, ("outdoor", "test"): 20}
    with pytest.raises(ValueError, match=message):
        deal(settings(**kwargs), ues, have(counts))


class Numbered:
    """A source whose rows say where they come from: 1000 x environment + row."""

    size = (1, 1)
    padded = 1
    array = (1, 1, 1)
    environments = SITES
    kind: Kind = "channel"

    def available(self, environment: Site, part: Part) -> int | None:
        return None

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        names = np.arange(start, stop) + 1000 * SITES.index(environment)
        return np.broadcast_to(names[:, None, None, None], (stop - start, 2, 1, 1)).astype("f4")

    def user_borders(self, environment: Site, part: Part) -> None:
        pass

    def identity(self, environment: Site, part: Part) -> dict[str, Any]:
        return {}

    def frequency_rows(self, environment: Site, part: Part, start: int, stop: int) -> str:
        return "rows without frequencies"


@pytest.mark.parametrize("holdout", [0.0, 0.05, 0.07, 0.3, 0.99])
@pytest.mark.parametrize("environment", ["indoor", "noniid"])
def test_holdout_splits_a_ues_rows(environment: Any, holdout: float) -> None:
    ues = 5
    dealt = deal(settings(environment=environment, train_samples=203), ues, endless)
    for ue in range(ues):
        train, held = load_ue(Numbered(), dealt, ue, holdout)
        total = len(train) + len(held)
        assert len(held) == min(round(holdout * total), total - 1)
        names = np.concatenate([train, held])[:, 0, 0, 0]
        own = [Numbered().rows(*span)[:, 0, 0, 0] for span in dealt.ues[ue]]
        np.testing.assert_array_equal(np.sort(names), np.concatenate(own))
        if environment == "noniid" and len(held) >= 2:
            assert len({bool(name >= 1000) for name in held[:, 0, 0, 0]}) == 2


def test_one_row_is_trained_on_and_not_held_out() -> None:
    dealt = deal(settings(train_samples=3), 3, endless)
    train, held = load_ue(Numbered(), dealt, 2, 0.9)
    assert train[:, 0, 0, 0].tolist() == [2]
    assert held.shape == (0, 2, 1, 1)


def test_the_test_set_is_common_and_mixed() -> None:
    dealt = deal(settings(environment="noniid", test_samples=5), 2, endless)
    rows = rows_of(Numbered(), dealt.test)
    assert rows[:, 0, 0, 0].tolist() == [0, 1, 2, 1000, 1001]


class Other(Numbered):
    """A source that gives what it is told to."""

    size = (4, 3)

    def __init__(self, given: Images) -> None:
        self.given = given

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        return self.given[start:stop]


@pytest.mark.parametrize(
    ("shape", "kind", "found"),
    [
        ((5, 2, 4, 3), "f8", r"float64 of shape \(5, 2, 4, 3\)"),
        ((5, 4, 3, 2), "f4", r"float32 of shape \(5, 4, 3, 2\)"),
        ((4, 2, 4, 3), "f4", r"float32 of shape \(4, 2, 4, 3\)"),
    ],
)
def test_a_source_that_gives_other_rows_is_named(
    shape: tuple[int, ...], kind: str, found: str
) -> None:
    source = Other(np.zeros(shape, kind))
    message = (
        rf"Other.rows\('indoor', 'train', 0, 5\) gives {found}; expected float32 of shape \(5,"
    )
    with pytest.raises(ValueError, match=message):
        rows_of(source, (Span("indoor", "train", 0, 5),))


def test_values_around_another_zero_are_named_before_training() -> None:
    h = np.random.default_rng(0).normal(size=(5, 2, 4, 3)).astype("f4")
    scaled = h / (2 * np.abs(h).max()) + np.float32(0.5)
    check_values(scaled, "mine", "good")
    check_values(h, "mine", "unusable")
    with pytest.raises(ValueError, match=r"mine: unusable: values from -.*, where 0.5 stands for"):
        check_values(h, "mine", "suspicious")
    with pytest.raises(ValueError, match="mine: unusable: values from nan to nan"):
        check_values(np.full_like(h, np.nan), "mine", "suspicious")


# The manifest


def test_a_manifest_repeats_the_split_of_files(tmp_path: Path) -> None:
    for site, suffix in (("in", 0), ("out", 9)):
        save(tmp_path / f"DATA_Htrain{site}.mat", images(40, suffix).reshape(40, -1))
        save(tmp_path / f"DATA_Hval{site}.mat", images(20, suffix + 1).reshape(20, -1))
        save(tmp_path / f"DATA_Htest{site}.mat", images(8, suffix + 2).reshape(8, -1))
    data = replace(csinet(tmp_path, seed=5), environment="noniid", holdout=0.2)
    source = open_source(data, 32, 32)
    dealt = deal(data, 3, source.available)
    manifest_of(dealt, data.holdout, source).write(tmp_path)

    again = Manifest.read(tmp_path)
    fresh = open_source(data, 32, 32)
    again.check(fresh)
    for ue in range(3):
        train, held = load_ue(source, dealt, ue, data.holdout)
        np.testing.assert_array_equal(rows_of(fresh, again.train[ue]), train)
        np.testing.assert_array_equal(rows_of(fresh, again.holdout[ue]), held)
    np.testing.assert_array_equal(rows_of(fresh, again.test), rows_of(source, dealt.test))

    content = json.loads((tmp_path / "manifest.json").read_text())
    counts = [(ue["rows"], ue["rows_held_out"]) for ue in content["ues"]]
    assert counts[0] == ({"indoor": 26, "outdoor": 6}, {"indoor": 7, "outdoor": 1})
    file = tmp_path / "DATA_Hvalout.mat"
    noted = content["streams"]["outdoor train"]["files"][1]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert noted == {"name": file.name, "rows": 20, "sha256": sha256}

    with pytest.raises(ValueError, match="the manifest's indoor train rows come from"):
        again.check(open_source(replace(data, seed=6), 32, 32))
    tested = tmp_path / "DATA_Htestin.mat"
    kept = tested.read_bytes()
    save(tested, images(8, 99).reshape(8, -1))
    with pytest.raises(ValueError, match="the manifest's indoor test rows come from"):
        again.check(open_source(data, 32, 32))
    tested.write_bytes(kept)
    save(file, images(20, 99).reshape(20, -1))
    with pytest.raises(ValueError, match="the manifest's outdoor train rows come from"):
        again.check(open_source(data, 32, 32))


def test_a_manifest_counts_rows_of_all_spans(tmp_path: Path) -> None:
    held = (Span("indoor", "train", 3, 5),)
    several = (Span("indoor", "train", 0, 3), Span("indoor", "train", 5, 6))
    Manifest(train=(several,), holdout=(held,), test=held, streams={}).write(tmp_path)
    [ue] = json.loads((tmp_path / "manifest.json").read_text())["ues"]
    assert (ue["rows"], ue["rows_held_out"]) == ({"indoor": 4}, {"indoor": 2})


def test_the_order_of_files_is_drawn_as_the_manifest_says(tmp_path: Path) -> None:
    orders = []
    for site, name in (("indoor", "in"), ("outdoor", "out")):
        save(tmp_path / f"DATA_Htrain{name}.mat", images(7).reshape(7, -1))
        source = open_source(csinet(tmp_path, seed=3), 32, 32)
        said = source.identity(site, "train")
        order = eval(said["order"], {"numpy": np})
        np.testing.assert_array_equal(source.rows(site, "train", 0, 7), images(7)[order])
        assert said["order_sha256"] == hashlib.sha256(order.tobytes()).hexdigest()
        orders.append(order.tolist())
    assert orders[0] != orders[1]


def test_a_manifest_repeats_the_split_of_generated_rows(tmp_path: Path) -> None:
    data = settings(train_samples=90, test_samples=10, holdout=0.1)
    source = open_source(data, 8, 8)
    dealt = deal(data, 4, source.available)
    manifest_of(dealt, data.holdout, source).write(tmp_path)
    again = Manifest.read(tmp_path)
    again.check(open_source(data, 8, 8))
    train, held = load_ue(source, dealt, 3, data.holdout)
    np.testing.assert_array_equal(rows_of(source, again.train[3]), train)
    np.testing.assert_array_equal(rows_of(source, again.holdout[3]), held)
    assert again.test == dealt.test
    with pytest.raises(ValueError, match=r"indoor train rows come from .*seed 0.*seed 1"):
        again.check(open_source(replace(data, seed=1), 8, 8))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        Manifest.read(tmp_path)
