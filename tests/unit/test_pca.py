"""A model that starts from a UE's principal components does at once what PCA does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csipipe import models
from csipipe.models import pca
from csipipe.models.pca import components
from csipipe.run import training
from csipipe.settings.config import (
    CodecSettings,
    CommSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)

MODEL = ModelSettings(c1=24, angles=8, delays=8, start="pca", kernels_by="torch")


def channels(rows: int, seed: int) -> Tensor:
    """(rows, 2, 8, 8) in [0, 1], of few dimensions and a few strong bins, as channels are."""
    weights = torch.linspace(3, 0.1, 40).exp() * torch.randn(
        rows, 40, generator=torch.Generator().manual_seed(seed)
    )
    basis = torch.linalg.qr(torch.randn(128, 40, generator=torch.Generator().manual_seed(9))).Q
    around_zero: Tensor = (weights @ basis.t() / 400).clamp(-0.5, 0.5)
    return 0.5 + around_zero.view(-1, 2, 8, 8)


def built(model: ModelSettings, rows: Tensor) -> nn.Sequential:
    encoder, head = models.build_encoder(model, 0), models.build_head(model, 0)
    models.start(model, encoder, head, [rows])
    return nn.Sequential(encoder, *models.build_tail(model, 0), head)


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / (wanted - 0.5).square().sum())


@pytest.mark.parametrize("c2", [None, 16, 40])
@pytest.mark.parametrize("training", [True, False])
def test_it_reconstructs_as_pca_does(c2: int | None, training: bool) -> None:
    rows, unseen = channels(500, 0), channels(300, 1)
    mean, basis, _ = components(rows.flatten(1), min(24, c2 or 24))
    by_pca = mean + (unseen.flatten(1) - mean) @ basis @ basis.t()
    with torch.no_grad():
        found = built(replace(MODEL, c2=c2), rows).train(training)(unseen)
    error = away(by_pca.view_as(unseen), unseen)
    assert 1e-3 < error < 0.5
    assert away(found, unseen) == pytest.approx(error, rel=0.05)


def test_components_are_those_of_most_variance_though_it_falls_slowly() -> None:
    rows = torch.randn(400, 100, generator=torch.Generator().manual_seed(0)) + 3
    mean, basis, variance = components(rows, 8)
    torch.testing.assert_close(mean, rows.mean(0))
    exact = torch.linalg.eigvalsh(torch.cov(rows.t(), correction=0)).flip(0)[:8]
    torch.testing.assert_close(variance, exact, rtol=5e-3, atol=0)
    code = (rows - mean) @ basis
    torch.testing.assert_close(code.var(0, correction=0), variance, rtol=5e-3, atol=0)


def test_of_many_rows_some_are_taken_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pca, "ROWS", 40)
    rows = channels(100, 0).flatten(1)
    torch.testing.assert_close(components(rows, 8)[0], rows[::3].mean(0))


def test_codewords_are_of_one_size_however_many_entries_they_have() -> None:
    rows = channels(500, 0)
    for c1 in (8, 24):
        model = replace(MODEL, c1=c1)
        encoder, head = models.build_encoder(model, 0), models.build_head(model, 0)
        models.start(model, encoder, head, [rows])
        with torch.no_grad():
            assert float(encoder.eval()(rows).square().mean().sqrt()) == pytest.approx(0.3, 0.05)


def test_parts_on_another_device_than_the_rows_are_set() -> None:
    """As centralised training does, whose parts are on the GPU by then: never computed with."""
    elsewhere = torch.device("meta")
    encoder = models.build_encoder(MODEL, 0).to(elsewhere)
    head = models.build_head(MODEL, 0).to(elsewhere)
    models.start(MODEL, encoder, head, [channels(100, 0)])
    assert {p.device for part in (encoder, head) for p in part.parameters()} == {elsewhere}


def test_components_are_those_of_a_full_decomposition() -> None:
    rows = channels(500, 0).flatten(1)
    mean, basis, variance = components(rows, 24)
    away = rows - rows.mean(0)
    wanted = torch.linalg.eigh(away.t() @ away / 500)
    assert mean == pytest.approx(rows.mean(0))
    assert variance == pytest.approx(wanted.eigenvalues.flip(0)[:24], rel=1e-3)
    assert (basis.t() @ wanted.eigenvectors.flip(1)[:, :24]).abs().diagonal().min() > 0.99


def test_more_components_than_rows_are_orthonormal() -> None:
    _, basis, variance = components(channels(10, 0).flatten(1), 24)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(24), atol=1e-5, rtol=0)
    assert (variance[10:] == 0).all()


def test_global_random_numbers_stay_as_they_were() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    built(MODEL, channels(50, 0))
    assert torch.rand(2).equal(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "csinet"}, "model.start is pca, with model.name csinet"),
        ({"split": (1, 5)}, r"model.split \(1, 5\)"),
        ({"head": "crblock"}, "model.head crblock"),
    ],
)
def test_models_that_cannot_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MODEL, **changes)


def test_more_components_than_an_image_has_are_refused() -> None:
    with pytest.raises(ValueError, match="128 reals"):
        models.check(replace(MODEL, c1=129))


def test_parts_that_are_averaged_start_alike() -> None:
    with pytest.raises(ValueError, match="method fedavg, whose UEs average encoder"):
        Settings(method="fedavg", model=MODEL)


def test_codewords_that_are_scaled_again_are_refused() -> None:
    with pytest.raises(ValueError, match=r"comm\.scale range"):
        Settings(model=MODEL, comm=CommSettings(scale="range", codec=CodecSettings(smashed="int8")))


def test_a_rate_that_loses_the_start_is_said() -> None:
    model = replace(MODEL, start="pca")
    quick, slow = (
        Settings(model=model, train=TrainSettings(lr=lr)) for lr in (2e-3, training.KEPT)
    )
    assert "train.lr 0.002: such steps lose" in training.start_notes(quick)[0]
    assert training.start_notes(slow) == []
    assert training.start_notes(Settings()) == []


def test_as_many_components_as_a_row_has_reals_are_allowed_and_no_more() -> None:
    models.check(replace(MODEL, c1=128))
    with pytest.raises(ValueError, match=r"model\.c1 129, but a row has 128 reals"):
        models.check(replace(MODEL, c1=129))
