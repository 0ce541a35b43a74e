"""Images of any size: what settings, models and figures make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from csipipe import models
from csipipe.channels import open_source, sized, statistics
from csipipe.channels.synthetic import SyntheticSource
from csipipe.measure import metrics
from csipipe.settings.config import DataSettings, ModelSettings, Settings


def test_null_is_the_datas_own_size_and_kind() -> None:
    found = sized(Settings())
    assert found.model.image == (2, 32, 32)
    assert found.data.kind == "channel"
    assert sized(found) == found
    chosen = sized(Settings(model=ModelSettings(angles=64, delays=5)))
    assert chosen.model.image == (2, 64, 5)
    assert chosen.model.reals == 640


def test_a_size_that_isnt_known_yet_isnt_taken_for_another() -> None:
    with pytest.raises(AssertionError):
        models.build_encoder(ModelSettings(), 0)


def test_settings_that_contradict_the_data_name_both(tmp_path: Path) -> None:
    data = DataSettings(source="csinet", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"model.delays is 33; CsiNet's files hold 32"):
        open_source(data, None, 33)
    assert open_source(data, 16, None).size == (16, 32)


@pytest.mark.parametrize("size", [(16, 32), (64, 32), (13, 7), (256, 64), (1, 1), (2, 1)])
def test_the_model_is_built_for_any_size(size: tuple[int, int]) -> None:
    model = ModelSettings(angles=size[0], delays=size[1], c1=6, c2=4)
    models.check(model)
    counts = models.count_parts(model)
    reals = 2 * size[0] * size[1]
    assert counts["encoder"] == 38 + 4 + reals * 6 + 6
    assert counts["head"] == 4 * reals + reals
    assert models.tail_shapes(model)[4] == (2, *size)


def test_one_pass_through_an_odd_image() -> None:
    model = ModelSettings(angles=5, delays=13, c1=6, c2=4, kernels_by="torch")
    x = torch.rand(3, 2, 5, 13)
    ends = models.build_encoder(model, 0), models.build_head(model, 0)
    for part in [ends[0], *models.build_tail(model, 0), ends[1]]:
        x = part(x)
    assert x.shape == (3, 2, 5, 13)


def test_a_model_that_cant_take_a_size_says_so() -> None:
    with pytest.raises(ValueError, match=r"encoder can't be built or run on a row .*\(2, 1, 1\)"):
        models.check(ModelSettings(name="test_sizes:pooling", c2=4, angles=1, delays=1))


def pooling(angles: int, delays: int, c1: int, c2: int) -> tuple[torch.nn.Module, ...]:
    """A user's model, which halves its image."""
    head = torch.nn.Sequential(
        torch.nn.Linear(c2, 2 * angles * delays), torch.nn.Unflatten(1, (2, angles, delays))
    )
    halves = torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.LazyLinear(c1)
    return torch.nn.Sequential(*halves), torch.nn.Sequential(torch.nn.Linear(c1, c2)), head


def test_principal_components_are_the_same_from_the_smaller_matrix() -> None:
    """64 × 32 has more reals than rows here, and fewer after the cut."""
    source = SyntheticSource(0, 16, 16)
    train = source.rows("indoor", "train", 0, 400)
    test = source.rows("indoor", "test", 0, 50)
    wide = statistics.pca_db(train, test)  # 512 reals, 400 rows
    mean = train.reshape(400, -1).mean(axis=0, dtype=np.float64)
    _, _, basis = np.linalg.svd(train.reshape(400, -1) - mean, full_matrices=False)
    for count, found in wide.items():
        known = basis[:count]
        again = mean + (test.reshape(50, -1) - mean) @ known.T @ known
        error = ((again - test.reshape(50, -1)) ** 2).sum(axis=1)
        energy = ((test.reshape(50, -1) - 0.5) ** 2).sum(axis=1)
        assert found == pytest.approx(10 * np.log10((error / energy).mean()), abs=0.02)
    assert set(wide) == {64, 128}


def test_sgcs_of_fewer_frequencies_than_subbands() -> None:
    hf = torch.randn(2, 3, 5, dtype=torch.complex64)
    torch.testing.assert_close(metrics.sgcs(2j * hf, hf), torch.ones(2))
    assert metrics.directions(hf).shape == (2, 3, 5)
