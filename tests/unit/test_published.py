"""Published models: their counts, and the same output as the authors' code with the same weights.

published.json holds what that code computed from the weights and rows of published.py: CRNet's,
CLNet's and TransNet's PyTorch (the latter with batch_first and one weight for both layers of a
side), CsiNet's Keras for images with channels last.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published import filled, rows
from torch import nn

from csipipe import models
from csipipe.export.parts import operations
from csipipe.settings.config import ModelSettings, Settings
from csipipe.settings.tables import MODELS

VALUES = json.loads((Path(__file__).parent / "published.json").read_text())
PIXELS = 1024


@pytest.mark.parametrize("name", VALUES)
def test_the_forward_pass_is_the_authors(name: str) -> None:
    encoder, tail, head = filled(name)
    with torch.no_grad():
        z = encoder(rows())
        h_hat = head(tail(z))
    for found, wanted in ((z, "codeword"), (h_hat, "output")):
        values = torch.tensor(VALUES[name][wanted])
        step = 97 if wanted == "codeword" else 383
        torch.testing.assert_close(found.flatten()[::step], values, rtol=1e-5, atol=2e-6)
    assert torch.tensor(VALUES[name]["output"]).std() > 0.01


@pytest.mark.parametrize(
    ("name", "c", "parameters", "counted"),
    [
        ("csinet", 512, 2_103_116, 5.41),
        ("csinet", 256, 1_054_284, 4.37),
        ("crnet", 512, 2_102_838, 5.12),
        ("crnet", 256, 1_054_006, 4.07),
        ("clnet", 512, 2_101_958, 4.03),
        ("clnet", 256, 1_053_126, 2.98),
        ("transnet", 512, 3_257_984, 39.58),
        ("transnet", 256, 2_209_152, 38.54),
        ("linear", 512, 2_362_368, 2.36),
    ],
)
def test_counts(name: str, c: int, parameters: int, counted: float) -> None:
    """Multiply-accumulates in millions, of convolutions, linear layers and attention's products."""
    assert (
        sum(models.count_parts(ModelSettings(name=name, c1=c, angles=32, delays=32)).values())
        == parameters
    )
    assert round(macs(name, c) / 1e6, 2) == counted


def test_other_published_counts_follow_from_ours() -> None:
    """Their counter also counts norms (three per scalar) and pooling, and skips attention."""
    norms, pooled = 117 * PIXELS, 33 * PIXELS - 992  # channels normalised; 32 means of 1,024 pixels
    assert round((macs("clnet", 512) + 3 * norms + pooled) / 1e6, 2) == 4.42
    assert round((macs("clnet", 256) + 3 * norms + pooled) / 1e6, 2) == 3.37
    tokens, width = 32, 64
    attention = 6 * (4 * tokens * width * width + 2 * tokens * tokens * width)
    norms = (2 * 2 + 2 * 3 + 1) * tokens * width
    assert round((macs("transnet", 512) - attention + 3 * norms) / 1e6, 2) == 35.72
    # its code applies one layer twice on either side
    encoder, tail, _ = filled("transnet")
    twice = models.count_parameters([encoder.get_submodule("2"), tail.get_submodule("3")])
    assert 3_257_984 - twice == 2_678_912


def macs(name: str, c: int) -> int:
    model = ModelSettings(name=name, c1=c, angles=32, delays=32, kernels_by="torch")
    encoder, head = models.build_encoder(model, 0).eval(), models.build_head(model, 0).eval()
    tail = nn.Sequential(*models.build_tail(model, 0)).eval()
    with torch.no_grad():
        z = encoder(rows())
        y = tail(z)
    return sum(operations(*part) for part in ((encoder, rows()), (tail, z), (head, y)))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_another_size(name: str) -> None:
    for c2 in (None, 10):
        model = ModelSettings(name=name, c1=12, c2=c2, angles=6, delays=4, kernels_by="torch")
        models.check(model)
        h = torch.rand(3, 2, 6, 4)
        z = models.build_encoder(model, 0)(h)
        y = nn.Sequential(*models.build_tail(model, 0))(z)
        published = 12 if MODELS[name].own_c2 else 48
        assert models.widths(model) == (z.shape[1], y.shape[1]) == (12, c2 or published)
        assert models.build_head(model, 0)(y).shape == h.shape


@pytest.mark.parametrize("name", [name for name in MODELS if not MODELS[name].own_c2])
def test_a_number_inserts_the_second_bottleneck(name: str) -> None:
    whole, narrow = (ModelSettings(name=name, c1=12, c2=c2, angles=6, delays=4) for c2 in (None, 5))
    before, after = models.count_parts(whole), models.count_parts(narrow)
    assert after["encoder"] == before["encoder"]
    assert after["tail"] == before["tail"] + 48 * 5 + 5
    assert after["head"] == before["head"] + 5 * 48 + 48
    assert len(models.tail_shapes(narrow)) == len(models.tail_shapes(whole)) + 1


@pytest.mark.parametrize("name", MODELS)
def test_its_partition_suits_two_stages(name: str) -> None:
    model = ModelSettings(name=name, c1=12, angles=6, delays=4)
    kind, _, pattern = Settings(model=model).partition.partition(":")
    layers = models.build_tail(model, 0)
    chosen = [x for x in layers if kind != "type" or pattern in type(x).__name__]
    assert models.count_parameters(chosen[:1])
    assert models.count_parameters(chosen[1:])
