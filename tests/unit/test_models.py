"""The model, counted as in the paper (reading.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from csipipe import models
from csipipe.models.crblock import SLOPE
from csipipe.models.initial import xavier
from csipipe.models.transnet import Attention
from csipipe.settings.config import ModelSettings


@pytest.mark.parametrize(
    ("c", "encoder", "tail", "head", "whole"),
    [
        (512, 1_049_130, 2_102_600, 1_050_624, 4_202_354),
        (256, 524_586, 1_053_768, 526_336, 2_104_690),
    ],
)
def test_parameters_are_the_papers(c: int, encoder: int, tail: int, head: int, whole: int) -> None:
    parts = models.count_parts(ModelSettings(c1=c, c2=c, angles=32, delays=32))
    assert parts == {"encoder": encoder, "tail": tail, "head": head}
    assert sum(parts.values()) == whole


def test_a_crblock_has_1425_parameters() -> None:
    block = models.CRBlock(ModelSettings().kernels)
    assert models.count_parameters([block]) == 1425
    block.join.requires_grad_(False)  # 2 · 14 weights, 2 · 2 of the norm
    assert models.count_parameters([block]) == 1425 - 32


def test_statistics_are_means_and_variances_alone() -> None:
    kernels = (((3, 3), (1, 9)), ((5, 5),))
    found = models.count_statistics(ModelSettings(angles=6, delays=4, c1=8, kernels=kernels))
    assert found == {"encoder": 2 * 2, "tail": 2 * 2 * (3 * 7 + 2), "head": 0}  # of two CRBlocks


def test_transnet_begins_near_the_middle() -> None:
    model = ModelSettings(name="transnet", c1=12, angles=6, delays=4)
    z = models.build_encoder(model, 1)(torch.rand(9, 2, 6, 4))
    image = models.build_head(model, 3)(torch.nn.Sequential(*models.build_tail(model, 2))(z))
    assert (image - 0.5).square().mean().sqrt() < 0.02
    narrow = models.build_tail(replace(model, c2=5), 2)
    assert any(
        isinstance(layer, torch.nn.LayerNorm) and (layer.weight == 1).all() for layer in narrow
    )


def test_clnets_decoder_begins_as_a_deconvolution() -> None:
    model = ModelSettings(name="clnet", c1=12, angles=6, delays=4)
    weight = models.build_tail(model, 0)[0].get_parameter("weight")
    assert 0.99 < float(weight.detach().abs().max()) * model.reals**0.5 <= 1


def test_attention_begins_as_one_matrix_for_queries_keys_and_values() -> None:
    torch.manual_seed(0)
    one = Attention(32)
    for layer in (one.query, one.memory):
        assert 0.99 < float(layer.weight.detach().abs().max()) / (6 / (32 + 96)) ** 0.5 <= 1


def test_a_head_with_a_crblock_begins_where_the_linear_one_does() -> None:
    """It costs a CRBlock's parameters; its branch begins at zero."""
    linear = ModelSettings(c1=12, c2=20, angles=32, delays=32)
    beyond = replace(linear, head="crblock")
    found, wanted = models.count_parts(beyond), models.count_parts(linear)
    assert found == wanted | {"head": wanted["head"] + 1425}
    y = torch.rand(8, 20)
    ours, theirs = models.build_head(beyond, 3), models.build_head(linear, 3)
    assert torch.equal(ours.state_dict()["0.weight"], theirs.state_dict()["0.weight"])
    y[0] *= 100  # beyond the values at first
    linear_layer, unflatten, _ = theirs.children()
    image = functional.leaky_relu(unflatten(linear_layer(y)), SLOPE)
    torch.testing.assert_close(ours(y), functional.hardsigmoid(image))
    for name, parameter in theirs.named_parameters():  # a tenth of PyTorch's usual range
        assert 0.9 < float(parameter.detach().abs().max()) * 10 * 20**0.5 <= 1, name
    with pytest.raises(ValueError, match=r"model\.head is crblock, but crnet has a decoder head"):
        replace(beyond, name="crnet")


@pytest.mark.parametrize("biases", [False, True])
def test_published_models_begin_in_xaviers_range(biases: bool) -> None:
    torch.manual_seed(0)
    one, other = torch.nn.Linear(10, 30), torch.nn.Conv2d(2, 7, 3)
    xavier(torch.nn.Sequential(one, other), biases)
    for weight, ends in ((one.weight, 10 + 30), (other.weight, 9 * (2 + 7))):
        assert 0.95 < float(weight.detach().abs().max()) / (6 / ends) ** 0.5 <= 1
    assert other.bias is not None
    assert [not bias.any() for bias in (one.bias, other.bias)] == [biases] * 2


def test_sizes_and_kernels_are_settings() -> None:
    model = ModelSettings(c1=12, c2=20, angles=6, delays=10, kernels=(((3, 1), (1, 3)), ((5, 5),)))
    h = torch.rand(3, 2, 6, 10)
    z = models.build_encoder(model, 0)(h)
    y = torch.nn.Sequential(*models.build_tail(model, 0))(z)
    assert z.shape == (3, 12)
    assert y.shape == (3, 20)
    h_hat = models.build_head(model, 0)(y)
    assert h_hat.shape == h.shape
    assert h_hat.min() >= 0
    assert h_hat.max() <= 1


def test_tail_shapes_are_those_of_a_real_pass() -> None:
    model = ModelSettings(c1=12, c2=20, angles=6, delays=10)
    x = torch.rand(2, 12)
    found = [tuple(x.shape[1:])]
    for layer in models.build_tail(model, 0):
        x = layer(x)
        found.append(tuple(x.shape[1:]))
    assert models.tail_shapes(model) == found


def test_weights_follow_from_the_seed_alone() -> None:
    model = ModelSettings(c1=8, c2=8, angles=4, delays=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = models.build_encoder(model, 3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    two = models.build_encoder(model, 3).state_dict()
    other = models.build_encoder(model, 4).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    tail = models.build_tail(model, 3)[0].state_dict()["weight"]
    head = 10 * models.build_head(model, 3).state_dict()["0.weight"]  # it starts at a tenth
    assert not torch.allclose(tail, head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c1": 0}, "model.c1 is 0"),
        ({"delays": -1}, "model.delays is -1"),
        ({"kernels": (((3, 3), (2, 9)),)}, r"\(2, 9\)"),
        ({"kernels": ((),)}, "needs a kernel"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSettings(**change)  # type: ignore[arg-type]
