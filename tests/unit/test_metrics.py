"""Figures of merit against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from csipipe.metrics import centred_nmse, floor_loss, paper_loss, to_db

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
