"""Eigenvectors per subband: how they are made, compared, minimised and shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from csipipe.channels import open_source, sized
from csipipe.channels.eigenvectors import images_of, to_image
from csipipe.channels.synthetic import SyntheticSource
from csipipe.evaluation import samples, testset
from csipipe.measure import metrics
from csipipe.measure.figures import WIDTH, WORST, Figures, row_sums
from csipipe.methods.objective import Objective
from csipipe.settings.config import DataSettings, LossName, ModelSettings, Settings, TrainSettings
from csipipe.settings.tables import LOSSES, LossSpec
from csipipe.tracking import Tracker, tables

CPU = torch.device("cpu")
VECTORS = DataSettings(kind="eigenvectors", train_samples=40, test_samples=12)


def channels(rx: int, ports: int, bins: int, count: int = 3) -> Any:
    """(count, rx, ports, bins) complex."""
    rng = np.random.default_rng(rx + ports)
    return rng.standard_normal((count, rx, ports, bins, 2)).view(np.complex128)[..., 0]


@pytest.mark.parametrize(("rx", "ports", "bins"), [(1, 8, 10), (2, 4, 12), (4, 3, 7), (1, 1, 2)])
def test_they_are_the_strongest_precoders_of_their_subbands(rx: int, ports: int, bins: int) -> None:
    """Fewer and more rows than ports; the subbands are as numpy.array_split cuts them."""
    h = channels(rx, ports, bins)
    found = images_of(h, 2)
    assert found.shape == (3, ports, 2)
    assert found.dtype == np.complex64
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    for sample in range(3):
        for s, part in enumerate(np.array_split(h[sample], 2, axis=2)):
            rows = part.transpose(0, 2, 1).reshape(-1, ports)
            wanted = np.linalg.svd(rows)[2][0].conj()
            assert abs(np.vdot(wanted, found[sample, :, s])) == pytest.approx(1, abs=1e-6)


def test_the_reference_port_is_real_and_positive_whatever_the_channels_phase() -> None:
    h = channels(2, 4, 6)
    turned = h * np.exp(1j * np.arange(6)) * 7
    found = images_of(h, 6)
    np.testing.assert_allclose(images_of(turned, 6), found, atol=1e-6)
    reference = (np.abs(found) ** 2).sum(axis=2).argmax(axis=1)
    entries = found[np.arange(3), reference]
    np.testing.assert_allclose(entries.imag, 0, atol=1e-7)
    assert (entries.real > 0).all()


def test_one_antenna_and_one_subcarrier_give_the_channels_conjugate() -> None:
    h = np.array([[[[3.0 + 0j]], [[4j]]]]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(images_of(h, 1)[0, :, 0], [0.6j, 0.8], atol=1e-7)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_a_channels_scale_makes_no_difference(scale: float) -> None:
    h = channels(2, 5, 4).astype(np.complex128)
    np.testing.assert_allclose(images_of(h * scale, 2), images_of(h, 2), atol=1e-6)


def test_an_image_holds_the_vector() -> None:
    v = images_of(channels(1, 5, 4), 4)
    image = to_image(v)
    assert image.shape == (3, 2, 5, 4)
    assert image.dtype == np.float32
    np.testing.assert_allclose(2 * (image[:, 0] - 0.5) + 2j * (image[:, 1] - 0.5), v, atol=2e-7)


def test_what_has_no_eigenvector_is_refused() -> None:
    h = channels(1, 3, 4)
    with pytest.raises(ValueError, match="subbands is 5, but the channels have 4 subcarriers"):
        images_of(h, 5)
    h[2, :, :, 2:] = 0
    with pytest.raises(ValueError, match=r"sample 2 .* no energy in subband 1 of 2"):
        images_of(h, 2)
    h[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"sample 1 .*NaN"):
        images_of(h, 2)


# Figures


def test_sgcs_of_columns_is_that_of_single_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    h_hat, h = torch.rand(2, 4, 2, 5, 3, generator=generator)
    wanted = metrics.sgcs(metrics.to_complex(h_hat), metrics.to_complex(h), 3)
    torch.testing.assert_close(metrics.column_sgcs(h_hat, h), wanted)
    torch.testing.assert_close(metrics.column_sgcs(h, h), torch.ones(4))
    short = 0.5 + 1e-3 * (h_hat - 0.5)  # it doesn't see the length
    torch.testing.assert_close(metrics.column_sgcs(short, h), wanted, rtol=1e-3, atol=1e-3)
    half = torch.full_like(h, 0.5, requires_grad=True)
    loss = metrics.sgcs_loss(half, h)
    torch.testing.assert_close(loss, torch.full((4,), 1 + metrics.HOLD))
    torch.autograd.backward(loss.sum())
    assert half.grad is not None
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["paper", "nmse", "sgcs"])
def test_what_is_minimised_changes_nothing_that_is_reported(loss: LossName) -> None:
    settings = Settings(data=VECTORS, train=TrainSettings(loss=loss))
    generator = torch.Generator().manual_seed(1)
    h_hat, h = torch.rand(2, 4, 2, 5, 3, generator=generator)
    length = 4 * (h_hat - 0.5).square().sum((1, 2))
    rows = Objective.of(settings)(h_hat.requires_grad_(), h)
    wanted = {
        "paper": metrics.paper_loss(h_hat, h),
        "nmse": metrics.centred_nmse(h_hat, h),
        "sgcs": 1 - metrics.column_sgcs(h_hat, h) + 0.1 * (length - 1).square().mean(1),
    }
    torch.testing.assert_close(rows.minimised, wanted[loss])
    assert rows.minimised.requires_grad
    assert not rows.loss.requires_grad
    torch.testing.assert_close(rows.loss, wanted["paper"])
    torch.testing.assert_close(rows.floor, metrics.floor_loss(h))
    assert rows.sgcs is not None
    torch.testing.assert_close(rows.sgcs, metrics.column_sgcs(h_hat, h))


def one_number(h_hat: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return (h_hat - h).abs().mean()


def one_per_pixel(h_hat: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return (h_hat - h).abs()


@pytest.mark.parametrize(
    ("loss", "shape"), [(one_number, r"\(\)"), (one_per_pixel, r"\(4, 2, 3, 5\)")]
)
def test_a_loss_is_one_number_per_row(
    loss: Any, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LossSpec(function=f"{__name__}:{loss.__name__}")
    monkeypatch.setitem(LOSSES, "nmse", spec)
    objective = Objective.of(Settings(train=TrainSettings(loss="nmse")))
    h = torch.rand(4, 2, 3, 5)
    message = rf"the loss {loss.__name__} gives {shape} for 4 rows; expected \(4,\)"
    with pytest.raises(ValueError, match=message):
        objective(h, h)


def test_the_loss_of_eigenvectors_keeps_their_length() -> None:
    """Directions that can't be learnt: steps at right angles, which would lengthen vectors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 2, 8, 3).normal_(generator=generator).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1)
    for _ in range(300):
        target = torch.rand(1, 2, 8, 3, generator=generator)
        adam.zero_grad()
        torch.autograd.backward(metrics.sgcs_loss(nn.functional.hardsigmoid(x), target).sum())
        adam.step()
    norm = 2 * (nn.functional.hardsigmoid(x) - 0.5).square().sum((1, 2)).sqrt()
    assert ((norm > 0.5) & (norm < 1.5)).all(), norm


def test_sgcs_needs_eigenvectors_and_the_error_names_both() -> None:
    wanted = Settings(train=TrainSettings(loss="sgcs"))  # the kind isn't known yet
    with pytest.raises(ValueError, match=r"train.loss is sgcs.*of kind channel"):
        sized(wanted)
    with pytest.raises(ValueError, match=r"data.kind is eigenvectors, but .* has channel"):
        open_source(DataSettings(source="csinet", path="tests", kind="eigenvectors"), None, None)


def test_the_best_weights_are_those_of_the_highest_sgcs() -> None:
    loss, floor = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.2])
    sums = torch.stack([row_sums(loss, floor, torch.tensor([0.9, 0.7]))] * 2)
    assert sums.shape == (2, WIDTH)
    found = Figures(sums)
    assert found.score(similarity=True)[1] == pytest.approx(0.2)
    assert found.score(similarity=False)[1] == pytest.approx(0.0, abs=1e-6)
    assert found.summary(similarity=True)["per_ue"][1]["sgcs"] == pytest.approx(0.8)
    assert "sgcs" not in found.summary()


def test_means_over_fewer_ues_have_no_better_weights() -> None:
    rows = torch.tensor([[2.0, 0.2, 0.2, 2.0, 0], [2.0, 1.0, 1.0, 2.0, 0]], dtype=torch.float64)
    everyone = Figures(rows)
    rows = rows.clone()
    rows[1] = 0
    without = Figures(rows, frozenset({1}))
    assert without.nmse_db < everyone.nmse_db
    assert everyone.score(False) < without.score(False) < WORST
    assert Figures(rows * math.nan).score(False) == WORST


def test_sgcs_is_on_the_screen_and_in_the_closing_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = Figures(torch.tensor([[10.0, 1.0, 5.0, 2.0, 8.5]], dtype=torch.float64))
    tracker = Tracker(tmp_path, Settings(data=VECTORS), 0)
    tracker.iteration(1, figures, 0.1, 0.5)
    assert "SGCS 0.8500" in capfd.readouterr().err
    lines = tables.test_table(figures.summary(similarity=True), None).splitlines()
    assert lines[0].split() == ["test", "set", "loss", "NMSE", "(dB)", "SGCS"]
    assert lines[1].split() == ["UE", "0", "1.000e-01", "-3.01", "0.8500"]


# Made by the package


def test_generated_eigenvectors_are_those_of_the_generated_channels() -> None:
    source = SyntheticSource(0, 8, 5, "eigenvectors")
    assert (source.size, source.kind) == ((8, 5), "eigenvectors")
    assert SyntheticSource(0, kind="eigenvectors").size == (32, 13)
    rows = source.rows("indoor", "test", 2, 6)
    over_angles = SyntheticSource(0, 8, 5).frequency_rows("indoor", "test", 2, 6)
    antennas = np.fft.ifft(over_angles, axis=1)[:, None]
    np.testing.assert_allclose(rows, to_image(images_of(antennas, 5)), atol=1e-6)
    with pytest.raises(ValueError, match=r"model.delays is 126; the channel has 125 frequencies"):
        SyntheticSource(0, 8, 126, "eigenvectors")


def test_evaluation_compares_the_columns_themselves() -> None:
    rows = testset.load(Settings(data=VECTORS, model=ModelSettings(angles=8, delays=26)))
    assert (rows.subbands, rows.missing) == (26, "")
    assert samples.ceiling(rows) == pytest.approx((1, 1), abs=1e-6)
    noisy = (rows.h_BAD + 0.1 * torch.randn(rows.h_BAD.shape)).clamp(0, 1)
    found = samples.measure([Fixed(noisy)], rows, "fp32", CPU)[0]
    wanted = metrics.column_sgcs(noisy, rows.h_BAD)
    sgcs = found[:, samples.COLUMNS.index("sgcs")]
    torch.testing.assert_close(sgcs, wanted.double(), rtol=1e-5, atol=1e-6)


class Fixed(nn.Module):
    """Answers with what it was given."""

    def __init__(self, h_hat: torch.Tensor) -> None:
        super().__init__()
        self.h_hat = h_hat

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.h_hat
