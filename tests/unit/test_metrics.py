"""Figures of merit against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from csipipe.measure.figures import Figures, row_sums
from csipipe.measure.metrics import (
    centred_nmse,
    floor_loss,
    paper_loss,
    rho,
    sgcs,
    to_db,
    to_frequency,
)

# Two samples of 2 x 1 x 2. Squares of h add up to .25 + 1 + .25 + 0 = 1.5 and
# 3 x .25 + .36 = 1.11; those of h - .5 to .25 + .25 = .5 and .01.
H = torch.tensor([[[[0.5, 1.0]], [[0.5, 0.0]]], [[[0.5, 0.5]], [[0.5, 0.6]]]])
# Errors: .1 in one real (squares .01); .2 in two reals (squares .08).
H_HAT = torch.tensor([[[[0.5, 0.9]], [[0.5, 0.0]]], [[[0.7, 0.5]], [[0.5, 0.4]]]])


def test_paper_loss_counts_the_offset() -> None:
    torch.testing.assert_close(paper_loss(H_HAT, H), torch.tensor([0.01 / 1.5, 0.08 / 1.11]))


def test_centred_nmse_leaves_the_offset_out() -> None:
    torch.testing.assert_close(centred_nmse(H_HAT, H), torch.tensor([0.02, 8.0]))


def test_floor_is_the_loss_of_a_constant_half() -> None:
    torch.testing.assert_close(floor_loss(H), torch.tensor([0.5 / 1.5, 0.01 / 1.11]))
    half = torch.full_like(H, 0.5)
    torch.testing.assert_close(floor_loss(H), paper_loss(half, H))
    torch.testing.assert_close(centred_nmse(half, H), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype(dtype: torch.dtype) -> None:
    h, h_hat = H.to(dtype), H_HAT.to(dtype)
    results = paper_loss(h_hat, h), centred_nmse(h_hat, h), floor_loss(h)
    assert [result.dtype for result in results] == [dtype] * 3


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError):
        paper_loss(H_HAT[:1], H)
    with pytest.raises(AssertionError):
        centred_nmse(H_HAT[:1], H)


def test_to_db() -> None:
    assert to_db(1.0) == 0.0
    assert to_db(0.001) == pytest.approx(-30.0)
    assert to_db(2.0) == pytest.approx(3.0103, abs=1e-4)
    assert to_db(0.0) == -math.inf
    assert math.isnan(to_db(math.nan))
    with pytest.raises(ValueError, match=r"ratio is -0\.1"):
        to_db(-0.1)


# Frequency: samples of 2 angles x 2 bins, [[angle 0], [angle 1]].


def test_to_frequency_is_a_padded_dft_over_delay() -> None:
    h = torch.full((1, 2, 2, 2), 0.5)
    h[0, 0, 0, 1] = 0.9  # 0.4 at angle 0, one bin late: a turn of a quarter per bin of four
    h[0, 1, 1, 0] = 0.2  # -0.3j at angle 1, delay 0
    expected = torch.tensor([[[0.4, -0.4j, -0.4], [-0.3j, -0.3j, -0.3j]]])
    torch.testing.assert_close(to_frequency(h, bins=3, padded=4), expected)
    assert to_frequency(h).shape == (1, 2, 125)
    torch.testing.assert_close(to_frequency(h), to_frequency(h, bins=125, padded=257))


def test_rho_is_the_mean_cosine_over_bins() -> None:
    # bin 0: (1, 1) and (1, 0), cosine 1/sqrt(2); bin 1: (1, j) and (1, -j), orthogonal
    hf_hat = torch.tensor([[[1, 1], [1, 1j]]])
    hf = torch.tensor([[[1, 1], [0, -1j]]])
    torch.testing.assert_close(rho(hf_hat, hf), torch.tensor([0.5**0.5 / 2]))


def test_rho_sees_neither_phase_nor_scale_of_a_bin() -> None:
    hf = torch.randn(3, 4, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    turned = hf * torch.tensor([1, 2j, -3, 0.1, -1j])
    torch.testing.assert_close(rho(turned, hf), torch.ones(3))
    torch.testing.assert_close(sgcs(turned, hf, 5), torch.ones(3))
    over_antennas = torch.fft.ifft(turned, dim=1), torch.fft.ifft(hf, dim=1)
    torch.testing.assert_close(rho(*over_antennas), torch.ones(3))
    assert rho(over_antennas[0], hf).max() < 0.95


def test_unused_bins_are_left_out_and_bins_that_a_reconstruction_lacks_count_as_0() -> None:
    hf = torch.randn(3, 4, 64, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    hf[:, :, 27:38] = 0
    there_and_back = torch.fft.fft(torch.fft.ifft(hf))
    assert (there_and_back[:, :, 27:38] != 0).any(), "rounding errors"
    half = hf * (torch.arange(64) < 32)  # 27 of 53 used bins; 32 of 64 subbands, 5 of them unused
    for reference in (hf, there_and_back):
        torch.testing.assert_close(rho(hf, reference), torch.ones(3))
        torch.testing.assert_close(rho(half, reference), torch.full((3,), 27 / 53))
        for subbands, share in ((64, 27 / 53), (8, 4 / 8), (2, 1 / 2)):
            torch.testing.assert_close(sgcs(hf, reference, subbands), torch.ones(3))
            found = sgcs(half, reference, subbands)
            torch.testing.assert_close(found, torch.full((3,), share))
    weak = hf * torch.where(torch.arange(64) < 32, 1, 1e-4)  # 80 dB below the others: they count
    torch.testing.assert_close(rho(half, weak), torch.full((3,), 27 / 53))
    torch.testing.assert_close(sgcs(half, weak, 64), torch.full((3,), 27 / 53))
    assert rho(hf, 0 * hf).isnan().all()
    assert sgcs(hf, 0 * hf).isnan().all()
    assert rho(0 * hf, hf).tolist() == sgcs(0 * hf, hf).tolist() == [0, 0, 0]


def test_sgcs_compares_the_strongest_directions_of_subbands() -> None:
    # bins (3, 4) and (-2, 1.5), orthogonal: the first is the stronger; and (2, 0), (1j, 0)
    hf_hat = torch.tensor([[[3, -2], [4, 1.5]]], dtype=torch.complex64)
    hf = torch.tensor([[[2, 1j], [0, 0]]])
    torch.testing.assert_close(sgcs(hf_hat, hf, 1), torch.tensor([9 / 25]))
    torch.testing.assert_close(sgcs(hf_hat, hf, 2), torch.tensor([(9 / 25 + 4 / 6.25) / 2]))
    for subbands in (0, 3):
        with pytest.raises(ValueError, match=rf"subbands is {subbands}; there are 2 bins"):
            sgcs(hf_hat, hf, subbands)


def test_sgcs_of_single_bins_is_the_squared_cosine() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 3, 4, 1, dtype=torch.complex64, generator=generator)
    torch.testing.assert_close(sgcs(one, other, 1), rho(one, other).square())
    many = torch.randn(2, 3, 4, 125, dtype=torch.complex64, generator=generator)
    torch.testing.assert_close(sgcs(many[0], many[1]), sgcs(many[0], many[1], 13))


# Sums over rows, per UE


def test_sums_are_of_each_rows_ratio_and_of_rows_that_count() -> None:
    loss, floor = torch.tensor([0.2, 0.3, 9.0]), torch.tensor([0.4, 0.1, 0.0])
    sums = row_sums(loss, floor, None, torch.tensor([True, True, False]))
    assert sums.tolist() == pytest.approx([2, 0.5, 0.5 + 3, 0.5, 0])
    assert sums.dtype == torch.float64


def test_means_are_over_rows_then_over_ues_that_have_some() -> None:
    sums = [[2, 0.2, 1.0, 0.8, 1.0], [4, 0.8, 6.0, 2.4, 3.0], [0, 0, 0, 0, 0]]
    found = Figures(torch.tensor(sums, dtype=torch.float64), frozenset({2}))
    assert found.loss == pytest.approx((0.1 + 0.2) / 2)
    assert found.nmse_db == pytest.approx(0)  # (0.5 + 1.5) / 2, then dB
    assert found.floor == pytest.approx((0.4 + 0.6) / 2)
    assert found.sgcs == pytest.approx((0.5 + 0.75) / 2)
    assert found.score(similarity=False) == pytest.approx((1, 0))
    assert found.score(similarity=True) == pytest.approx((1, 1 - 0.625))
    assert [row["ue"] for row in found.summary()["per_ue"]] == [0, 1]
