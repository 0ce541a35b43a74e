"""Sources of channels, their closed form and statistics, the deal to UEs, and CsiNet's files."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import io, linalg

from csipipe.channels import Deal, Span, deal, load_test, load_ue, open_source
from csipipe.channels.images import images_of_rays
from csipipe.channels.matfile import read_images
from csipipe.channels.source import Images, Part, Site
from csipipe.channels.synthetic import BLOCK, SyntheticSource, generator
from csipipe.channels.transform import shrink, to_complex, to_unit
from csipipe.config import DataSettings

SITES: tuple[Site, ...] = ("indoor", "outdoor")


@pytest.fixture(scope="module")
def small() -> SyntheticSource:
    return SyntheticSource(seed=3, angles=8, delays=4)


# The synthetic stream


def test_rows_have_shape_type_and_range(small: SyntheticSource) -> None:
    rows = small.rows("outdoor", "train", 5, 12)
    assert rows.shape == (7, 2, 8, 4)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    assert rows.min() >= 0
    assert rows.max() <= 1
    peak = np.abs(to_complex(rows)).max(axis=(1, 2))
    np.testing.assert_allclose(peak, 0.5, atol=1e-6)
    assert small.rows("indoor", "train", 4, 4).shape == (0, 2, 8, 4)
    assert small.available("indoor", "train") is None


def test_a_row_does_not_depend_on_what_else_is_made(small: SyntheticSource) -> None:
    whole = small.rows("indoor", "train", 0, 3 * BLOCK)
    for start, stop in ((0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (100, 300)):
        part = SyntheticSource(3, 8, 4).rows("indoor", "train", start, stop)
        np.testing.assert_array_equal(part, whole[start:stop])


def test_only_blocks_with_asked_rows_are_made(
    small: SyntheticSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def spy(seed: int, site: Site, part: Part, block: int) -> np.random.Generator:
        made.append(block)
        return generator(seed, site, part, block)

    monkeypatch.setattr("csipipe.channels.synthetic.generator", spy)
    small.rows("indoor", "train", 2 * BLOCK, 3 * BLOCK + 1)
    assert made == [2, 3]


def test_every_block_has_its_own_random_numbers() -> None:
    parts: tuple[Part, ...] = ("train", "test")
    draws = {
        generator(seed, site, part, block).random()
        for seed, site, part, block in product((0, 1), SITES, parts, (0, 1))
    }
    assert len(draws) == 16


def test_streams_differ_by_seed_environment_part_and_block(small: SyntheticSource) -> None:
    streams = [
        small.rows("indoor", "train", 0, 4),
        small.rows("indoor", "train", BLOCK, BLOCK + 4),
        small.rows("indoor", "test", 0, 4),
        small.rows("outdoor", "train", 0, 4),
        SyntheticSource(4, 8, 4).rows("indoor", "train", 0, 4),
    ]
    rows = np.concatenate(streams).reshape(20, -1)
    apart = np.abs(rows[:, None] - rows[None]).max(axis=2) + np.eye(20)
    assert apart.min() > 0.05


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2)])
def test_impossible_ranges_are_refused(small: SyntheticSource, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"rows {start} to {stop}"):
        small.rows("indoor", "train", start, stop)


def test_more_delays_than_subcarriers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.delays is 1025.*1024"):
        open_source(DataSettings(), 32, 1025)


# The closed form


def test_closed_form_is_the_transformed_ofdm_grid() -> None:
    """Against steering vectors and 1024 subcarriers, DFT, inverse DFT and truncation."""
    antennas, subcarriers, delays = 32, 1024, 32
    # The third ray lies on a bin of both axes, the fourth within float32 rounding of one.
    gain = np.array([[1.0, 0.6j, -0.4 + 0.2j, 0.5], [0.3j, 1.0, 0.2, -0.7]])
    frequency = np.array([[0.1234, -0.5, -7 / 32, 3 / 32 + 1e-8], [0.5, 0.0, 0.31, -0.27]])
    delay = np.array([[0.5, 17.3, 5.0, 9.0 + 1e-7], [0.0, 3.7, 31.9, 40.2]])

    n, k = np.arange(antennas)[:, None], np.arange(subcarriers)[None]
    grid = np.zeros((2, antennas, subcarriers), complex)
    for sample in range(2):
        for g, u, t in zip(gain[sample], frequency[sample], delay[sample], strict=True):
            grid[sample] += g * np.exp(2j * np.pi * (u * n - t * k / subcarriers))
    expected = np.fft.ifft(np.fft.fft(grid, axis=1) / antennas, axis=2)[..., :delays]

    made = images_of_rays(
        gain, frequency, delay, angles=antennas, delays=delays, subcarriers=subcarriers
    )
    np.testing.assert_allclose(made, expected, atol=1e-5)


# Statistics, beside COST 2100's


class Statistics:
    """What is compared with COST 2100, of [0, 1] images."""

    def __init__(self, rows: Images) -> None:
        self.centred = (rows - np.float32(0.5)).reshape(len(rows), -1)
        power = np.abs(to_complex(rows)) ** 2
        power /= power.sum(axis=(1, 2), keepdims=True)
        self.by_delay = np.cumsum(power.sum(axis=1).mean(axis=0))[[0, 1, 3, 7, 15]]
        turn = np.exp(2j * np.pi * np.arange(32) / 32)
        self.concentration = float(np.median(np.abs(power.sum(axis=2) @ turn)))
        best_first = np.sort(power.reshape(len(rows), -1), axis=1)[:, ::-1]
        self.best_bins = best_first.cumsum(axis=1).mean(axis=0)[[0, 1, 3, 7, 15, 31]]
        self.power = float((self.centred**2).mean())

    def pca_db(self, components: int = 256, tested: int = 512) -> float:
        """Centred NMSE of the last rows under the components of the others."""
        train, test = self.centred[:-tested], self.centred[-tested:]
        mean = train.mean(axis=0)
        train = train - mean
        size = train.shape[1]
        _, basis = linalg.eigh(train.T @ train, subset_by_index=[size - components, size - 1])
        error = test - mean
        error = error - error @ basis @ basis.T
        return float(10 * np.log10(((error**2).sum(1) / (test**2).sum(1)).mean()))


REFERENCE: dict[Site, dict[str, Any]] = {
    "indoor": {
        "by_delay": [0.39, 0.85, 0.94, 0.99, 1.0],
        "best_bins": [0.28, 0.45, 0.63, 0.78, 0.88, 0.94],
        "concentration": 0.61,
        "power": 5.0e-4,
        "pca_db": (-17.5, -12.0),
    },
    "outdoor": {
        "by_delay": [0.00, 0.01, 0.04, 0.21, 0.81],
        "best_bins": [0.33, 0.47, 0.61, 0.73, 0.83, 0.905],
        "concentration": 0.87,
        "power": 4.7e-4,
        "pca_db": (-2.6, -1.5),
    },
}


@pytest.mark.parametrize("site", SITES)
def test_statistics_are_close_to_cost_2100(site: Site) -> None:
    expected = REFERENCE[site]
    made = Statistics(SyntheticSource(0, 32, 32).rows(site, "train", 0, 3072))
    np.testing.assert_allclose(made.by_delay, expected["by_delay"], atol=0.03)
    np.testing.assert_allclose(made.best_bins, expected["best_bins"], atol=0.03)
    assert made.concentration == pytest.approx(expected["concentration"], abs=0.06)
    assert made.power == pytest.approx(expected["power"], rel=0.15)
    lowest, highest = expected["pca_db"]
    assert lowest < made.pca_db() < highest


# Cutting images to a smaller array


def test_shrink_to_the_same_size_only_rescales() -> None:
    rng = np.random.default_rng(0)
    rows = rng.random((3, 2, 32, 32), np.float32)
    np.testing.assert_allclose(shrink(rows, 32, 32), to_unit(to_complex(rows)), atol=1e-6)
    scaled = SyntheticSource(0, 32, 32).rows("outdoor", "train", 0, 3)
    np.testing.assert_allclose(shrink(scaled, 32, 32), scaled, atol=1e-6)


def test_shrink_moves_a_path_on_the_grid_to_its_bin() -> None:
    rows = np.full((1, 2, 32, 32), 0.5, np.float32)
    rows[0, 1, 8, 3] = 0.9  # a quarter of a cycle per antenna: bin 8 of 32, bin 4 of 16
    expected = np.full((1, 2, 16, 8), 0.5, np.float32)
    expected[0, 1, 4, 3] = 1.0
    np.testing.assert_allclose(shrink(rows, 16, 8), expected, atol=1e-6)


@pytest.mark.parametrize(("angles", "delays"), [(16, 32), (5, 12)])
def test_shrink_is_what_a_smaller_array_measures(angles: int, delays: int) -> None:
    large = SyntheticSource(1, 32, 32).rows("indoor", "test", 0, 20)
    direct = SyntheticSource(1, angles, delays).rows("indoor", "test", 0, 20)
    np.testing.assert_allclose(shrink(large, angles, delays), direct, atol=1e-5)


def test_shrink_does_not_grow() -> None:
    with pytest.raises(ValueError, match=r"model\.delays is 5; the data has 4"):
        shrink(np.full((1, 2, 8, 4), 0.5, np.float32), 8, 5)


def test_an_empty_channel_stays_at_zero() -> None:
    np.testing.assert_array_equal(to_unit(np.zeros((1, 2, 2), complex)), 0.5)


# The deal of rows to UEs


def settings(**kwargs: Any) -> DataSettings:
    return DataSettings(**kwargs)


def endless(site: Site, part: Part) -> int | None:
    return None


def have(counts: dict[tuple[str, str], int]) -> Callable[[Site, Part], int | None]:
    return lambda site, part: counts[site, part]


def counts_of(dealt: Deal, site: Site, ues: int) -> list[int]:
    return [sum(s.size for s in dealt.train(n) if s.environment == site) for n in range(ues)]


def test_the_papers_mixture() -> None:
    data = settings(environment="noniid", train_samples=130_000, test_samples=20_000)
    dealt = deal(data, 10, endless)
    shares = [12_350 - 1_300 * n for n in range(10)]
    assert counts_of(dealt, "indoor", 10) == shares
    assert shares[-1] == 650
    assert counts_of(dealt, "outdoor", 10) == shares[::-1]
    assert dealt.train(1)[0] == Span("indoor", "train", 12_350, 12_350 + 11_050)
    test = (Span("indoor", "test", 0, 10_000), Span("outdoor", "test", 0, 10_000))
    assert dealt.test == test


@pytest.mark.parametrize("environment", ["indoor", "outdoor", "noniid"])
def test_every_row_is_dealt_once(environment: Any) -> None:
    for ues in (1, 2, 3, 4, 7, 10, 13):
        for total in [*range(ues, 45), 999, 1000, 8000]:
            dealt = deal(settings(environment=environment, train_samples=total), ues, endless)
            sizes = [sum(span.size for span in dealt.train(n)) for n in range(ues)]
            assert sizes == [total // ues + (n < total % ues) for n in range(ues)]
            for site in SITES:
                spans = [s for n in range(ues) for s in dealt.train(n) if s.environment == site]
                assert all(s.size > 0 and s.part == "train" for s in spans)
                assert all(a.stop == b.start for a, b in pairwise(spans))
                assert not spans or spans[0].start == 0
            if environment == "noniid":
                indoor = counts_of(dealt, "indoor", ues)
                assert sum(indoor) == (total + 1) // 2
                shares = [(2 * (ues - n) - 1) / ues**2 for n in range(ues)]
                off = np.cumsum(indoor) - np.cumsum(shares) * sum(indoor)
                assert np.abs(off).max() < 0.5 + 1e-9


def test_null_takes_what_there_is_and_evenly_in_the_mixture() -> None:
    counts = {("indoor", "train"): 80, ("outdoor", "train"): 30}
    counts |= {("indoor", "test"): 9, ("outdoor", "test"): 12}
    indoor = deal(settings(), 3, have(counts))
    assert counts_of(indoor, "indoor", 3) == [27, 27, 26]
    assert indoor.test == (Span("indoor", "test", 0, 9),)
    mixed = deal(settings(environment="noniid"), 3, have(counts))
    assert sum(counts_of(mixed, "indoor", 3)) == sum(counts_of(mixed, "outdoor", 3)) == 30
    assert [span.size for span in mixed.test] == [9, 9]


@pytest.mark.parametrize("environment", ["outdoor", "noniid"])
def test_synthetic_defaults(environment: Any) -> None:
    dealt = deal(settings(environment=environment), 4, endless)
    assert sum(span.size for n in range(4) for span in dealt.train(n)) == 8000
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

    def available(self, environment: Site, part: Part) -> int | None:
        return None

    def rows(self, environment: Site, part: Part, start: int, stop: int) -> Images:
        names = np.arange(start, stop) + 1000 * SITES.index(environment)
        return np.broadcast_to(names[:, None, None, None], (stop - start, 2, 1, 1)).astype("f4")


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
        own = [Numbered().rows(*span)[:, 0, 0, 0] for span in dealt.train(ue)]
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
    rows = load_test(Numbered(), dealt)
    assert rows[:, 0, 0, 0].tolist() == [0, 1, 2, 1000, 1001]


# CsiNet's files


def images(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).random((count, 2, 32, 32), np.float32)


def save(path: Path, values: Any, key: str = "HT", **kwargs: Any) -> Path:
    io.savemat(path, {key: values}, **kwargs)
    return path


def csinet(folder: Path, seed: int = 0) -> DataSettings:
    return settings(source="csinet", path=str(folder), seed=seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "DATA_Htrainin.mat", images(9).reshape(9, -1))
    save(tmp_path / "DATA_Hvalin.mat", images(3, 1).reshape(3, -1), do_compression=True)
    save(tmp_path / "DATA_Htestin.mat", images(4, 2).astype(np.float64))
    return tmp_path


def test_training_and_validation_files_are_joined_and_shuffled_by_seed(folder: Path) -> None:
    source = open_source(csinet(folder), 32, 32)
    rows = source.rows("indoor", "train", 0, 12)
    assert source.available("indoor", "train") == 12
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    joined = np.concatenate([images(9), images(3, 1)])
    order = [int(np.flatnonzero((joined == row).all(axis=(1, 2, 3)))[0]) for row in rows]
    assert sorted(order) == list(range(12))
    assert order != sorted(order)
    np.testing.assert_array_equal(source.rows("indoor", "train", 5, 8), rows[5:8])
    again = open_source(csinet(folder), 32, 32).rows("indoor", "train", 0, 12)
    np.testing.assert_array_equal(again, rows)
    other = open_source(csinet(folder, seed=1), 32, 32).rows("indoor", "train", 0, 12)
    assert not np.array_equal(other, rows)


def test_test_rows_come_in_file_order_and_four_axes_are_accepted(folder: Path) -> None:
    rows = open_source(csinet(folder), 32, 32).rows("indoor", "test", 1, 4)
    np.testing.assert_array_equal(rows, images(4, 2)[1:])


def test_a_file_is_read_once_and_only_when_needed(folder: Path) -> None:
    source = open_source(csinet(folder), 32, 32)
    first = source.rows("indoor", "test", 0, 4)
    for path in folder.iterdir():
        path.unlink()
    np.testing.assert_array_equal(source.rows("indoor", "test", 0, 4), first)
    with pytest.raises(FileNotFoundError):
        source.rows("indoor", "train", 0, 1)


def test_smaller_models_get_shrunk_images(folder: Path) -> None:
    rows = open_source(csinet(folder), 16, 8).rows("indoor", "test", 0, 4)
    np.testing.assert_array_equal(rows, shrink(images(4, 2), 16, 8))


def test_missing_folders_files_rows_and_bins(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path is .*nowhere, which is not a folder"):
        open_source(csinet(folder / "nowhere"), 32, 32)
    with pytest.raises(ValueError, match=r"model\.angles is 64; CsiNet's files hold 32"):
        open_source(csinet(folder), 64, 32)
    source = open_source(csinet(folder), 32, 32)
    with pytest.raises(FileNotFoundError, match=r"DATA_Htrainout\.mat .*'DATA_Hvalin\.mat'"):
        source.available("outdoor", "train")
    with pytest.raises(ValueError, match=r"rows 2 to 5 were asked for; .* <= 4"):
        source.rows("indoor", "test", 2, 5)


WITH_NAN = images(5).reshape(5, -1)
WITH_NAN[3, 7], WITH_NAN[4, 0] = np.nan, np.inf
WITH_EMPTY = images(4).reshape(4, -1)
WITH_EMPTY[1], WITH_EMPTY[3] = 0.5, 0.0


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        (images(2).reshape(2, -1), "H", r"no variable HT; found \['H'\].*rename"),
        (np.zeros((5, 2000)), "HT", r"shape \(5, 2000\); expected .*2048.*A row must hold"),
        (images(3).reshape(3, -1).T, "HT", r"shape \(2048, 3\).*transposed"),
        (np.zeros((2, 1, 32, 64)), "HT", r"shape \(2, 1, 32, 64\).*Reshape"),
        (np.zeros((0, 2048)), "HT", r"shape \(0, 2048\).*no rows"),
        (np.full((2, 2048), 0.5 + 0.1j), "HT", r"holds complex128 values; expected reals"),
        (np.ones((2, 2048), np.int16), "HT", r"class int16; expected real single or double"),
        (np.full((2, 2048), "a", object), "HT", r"class cell; expected real"),
        (WITH_NAN, "HT", r"NaN or infinite values in 2 row\(s\), the first of them row 3"),
        (WITH_EMPTY, "HT", r"2 row\(s\) of HT hold one value .* row 1 .* without energy"),
        (images(2).reshape(2, -1) - 0.5, "HT", r"lies in \[-0\.\d+, 0\.\d+\].*add 0\.5"),
        (np.linspace(0, 255, 4096).reshape(2, -1), "HT", r"lies in \[0, 255\].*Scale each row"),
    ],
)
def test_wrong_contents(tmp_path: Path, values: Any, key: str, message: str) -> None:
    path = save(tmp_path / "DATA_Htrainin.mat", values, key)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(csinet(tmp_path), 32, 32).rows("indoor", "train", 0, 1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, compressed: bool, share: float) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    save(path, images(4).reshape(4, -1), do_compression=compressed)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"DATA_Htestin\.mat can't be read: .*truncated"):
        read_images(path)


def test_files_that_are_not_mat_v5(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    for content in (b"", b"<!DOCTYPE html><title>404</title>", b"\x80\x04pickle" + bytes(600)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a MAT v5 file: it starts with b'"):
            read_images(path)
    save(path, np.full((2, 2048), 0.5), format="4")
    with pytest.raises(ValueError, match="not a MAT v5 file"):
        read_images(path)


def test_big_endian_files_are_mat_v5_too(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI" + b"\x00\x00\x00\x0e")
    with pytest.raises(ValueError, match="can't be read"):
        read_images(path)


def test_mat_v73_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "DATA_Htestin.mat"
    text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124)
    path.write_bytes((text + b"\x00\x02IM").ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"v7\.3 file, that is HDF5.*save\(\.\.\., \"-v7\"\)"):
        read_images(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    with pytest.raises(ValueError, match="HDF5"):
        read_images(path)


# COST 2100's own files, where they are present


@pytest.mark.parametrize("site", SITES)
def test_cost_2100_files(site: Site) -> None:
    root = Path(__file__).resolve().parents[2]
    found = Path(os.environ.get("CSIPIPE_COST2100", root / "../shared/data/cost2100"))
    if not found.is_dir():
        pytest.skip("the COST 2100 files are not here; set CSIPIPE_COST2100 to their folder")
    source = open_source(csinet(found), 32, 32)
    count = source.available(site, "test")
    assert count is not None
    assert count > 500
    rows = source.rows(site, "test", 0, count)
    np.testing.assert_allclose(shrink(rows, 32, 32), rows, atol=1e-6)
    made, expected = Statistics(rows), REFERENCE[site]
    np.testing.assert_allclose(made.by_delay, expected["by_delay"], atol=0.03)
    assert made.power == pytest.approx(expected["power"], rel=0.1)
