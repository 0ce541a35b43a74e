"""The synthetic stream, its closed forms and statistics, and the cut to smaller arrays."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from csifiles import SITES, csinet

from csipipe.channels import open_source
from csipipe.channels.images import frequencies_of_rays, images_of_rays
from csipipe.channels.source import Images, Part, Site
from csipipe.channels.statistics import by_components, measure, pca_db
from csipipe.channels.synthetic import BLOCK, SyntheticSource, generator
from csipipe.channels.transform import shrink, to_complex, to_unit
from csipipe.settings.config import DataSettings


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


def test_closed_form_of_the_frequencies_is_the_ofdm_grid() -> None:
    """Against steering vectors at the 257-point grid's first frequencies and the angle DFT."""
    rng = np.random.default_rng(2)
    gain = rng.standard_normal((3, 8)).view(complex)
    frequency, delay = rng.uniform(-0.5, 0.5, (3, 4)), rng.uniform(0, 60, (3, 4))
    n, f = np.arange(32)[:, None], np.arange(125)[None]
    grid = np.zeros((3, 32, 125), complex)
    for sample in range(3):
        for g, u, t in zip(gain[sample], frequency[sample], delay[sample], strict=True):
            grid[sample] += g * np.exp(2j * np.pi * (u * n - t * f / 257))
    made = frequencies_of_rays(gain, frequency, delay, angles=32)
    np.testing.assert_allclose(made, np.fft.fft(grid, axis=1) / 32, atol=1e-5)


def test_whole_delays_agree_between_image_and_frequencies() -> None:
    """Where truncation loses nothing: CsiNet's way from the image to the frequencies is exact."""
    gain = np.array([[1.0, 0.6j, -0.4 + 0.2j]])
    frequency, delay = np.array([[0.1234, -0.5, 0.3]]), np.array([[0.0, 17.0, 31.0]])
    image = images_of_rays(gain, frequency, delay, angles=32, delays=32, subcarriers=1024)
    expected = np.fft.fft(image, 257, axis=2)[..., :125]
    made = frequencies_of_rays(gain, frequency, delay, angles=32)
    np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize(("site", "least"), [("indoor", 0.95), ("outdoor", 0.8)])
def test_untruncated_channels_are_those_of_the_images(site: Site, least: float) -> None:
    source = SyntheticSource(0, 32, 32)
    start, stop = BLOCK - 30, BLOCK + 170
    made = source.frequency_rows(site, "test", start, stop)
    assert made.shape == (200, 32, 125)
    assert made.dtype == np.complex64
    image = to_complex(source.rows(site, "test", start, stop))
    again = np.fft.fft(image, 257, axis=2)[..., :125]
    product = np.abs((again.conj() * made).sum(axis=1))
    rho = product / np.linalg.norm(again, axis=1) / np.linalg.norm(made, axis=1)
    assert rho.mean() > least
    other = np.abs((again.conj() * made[::-1]).sum(axis=1))
    assert (other / np.linalg.norm(again, axis=1) / np.linalg.norm(made[::-1], axis=1)).mean() < 0.6


# Statistics, beside COST 2100's


def concentration(rows: Images) -> float:
    """How much of a sample's energy comes from one side: the median of 0, all round, to 1."""
    power = (np.abs(to_complex(rows)) ** 2).sum(axis=2)
    turn = np.exp(2j * np.pi * np.arange(32) / 32)
    return float(np.median(np.abs(power @ turn) / power.sum(axis=1)))


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
    rows = SyntheticSource(0, 32, 32).rows(site, "train", 0, 3072)
    made = measure(rows)
    by_delay, best_bins = list(made.first_delays.values()), list(made.best_bins.values())
    np.testing.assert_allclose(by_delay, expected["by_delay"], atol=0.03)
    np.testing.assert_allclose(best_bins[:6], expected["best_bins"], atol=0.03)
    assert concentration(rows) == pytest.approx(expected["concentration"], abs=0.06)
    assert made.power == pytest.approx(expected["power"], rel=0.15)
    lowest, highest = expected["pca_db"]
    assert lowest < pca_db(rows[:-512], rows[-512:], [256])[256] < highest


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


def test_an_empty_channel_stays_at_zero() -> None:
    np.testing.assert_array_equal(to_unit(np.zeros((1, 2, 2), complex)), 0.5)


# COST 2100's own files, where they are present


@pytest.mark.parametrize("site", SITES)
def test_cost_2100_files(site: Site, cost2100: Path) -> None:
    source = open_source(csinet(cost2100), 32, 32)
    count = source.available(site, "test")
    assert count is not None
    assert count > 500
    rows = source.rows(site, "test", 0, count)
    np.testing.assert_allclose(shrink(rows, 32, 32), rows, atol=1e-6)
    made, expected = measure(rows), REFERENCE[site]
    by_delay = list(made.first_delays.values())
    np.testing.assert_allclose(by_delay, expected["by_delay"], atol=0.03)
    assert made.power == pytest.approx(expected["power"], rel=0.1)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", [20, 60], ids=["fewer rows than reals", "more"])
def test_principal_components_are_those_of_an_svd(rows: int, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0.01, 0.3, (rows + 9, 1))  # rows of unequal energy
    images = 0.5 + sizes * (rng.standard_normal((rows + 9, 32)) @ np.diag(np.geomspace(1, 0.1, 32)))
    train, test = images[:rows].astype(np.float32), images[rows:].astype(np.float32)
    weight = (
        1 / np.linalg.norm(train - 0.5, axis=1, keepdims=True) if weighted else np.ones((rows, 1))
    )
    mean = (weight**2 * train).sum(0) / (weight**2).sum()
    basis = np.linalg.svd((train - mean) * weight, full_matrices=False)[2][:5]
    shape = (-1, 2, 4, 4)
    [(n, found, of)] = by_components(
        train.reshape(shape), test.reshape(shape), (5,), weighted=weighted
    )
    assert n == 5
    np.testing.assert_array_equal(of, test.reshape(shape))
    wanted = mean + (test - mean) @ basis.T @ basis
    np.testing.assert_allclose(found, wanted.reshape(shape), atol=1e-4)
