"""A codeword that is trained for its bits: the same numbers in training, on the wire, exported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from csipipe.comm import codec, trust
from csipipe.export.parts import Pair, run, trained_for
from csipipe.models.ranged import Ranged, end_of, levels, middles
from csipipe.run.trained import Autoencoder
from csipipe.settings.config import CodecSettings, CommSettings, ModelSettings, Settings

SMALL = ModelSettings(c1=12, c2=8, angles=8, delays=8, kernels_by="torch")
NAMES = {2: "int2", 4: "int4", 8: "int8"}


def comm(bits: int) -> CommSettings:
    return CommSettings(codec=CodecSettings(smashed=NAMES[bits]), scale="range")


def images(rows: int = 40) -> torch.Tensor:
    return torch.rand(rows, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def encoder(bits: int) -> Ranged:
    inner = nn.Sequential(nn.Flatten(), nn.Linear(128, 12))
    return Ranged(inner, 12, bits)


@pytest.mark.parametrize("bits", NAMES)
def test_the_ranges_are_those_of_the_first_mini_batch(bits: int) -> None:
    one = encoder(bits)
    one.eval()(images())
    assert not one.learnt  # an evaluation teaches nothing
    one.train()(images())
    u = one.unrounded(images())
    torch.testing.assert_close(u.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(u.std(0, correction=0), torch.ones(12))
    before = one.centre.clone()
    one.train()(images() * 3)
    assert torch.equal(one.centre, before)


@pytest.mark.parametrize("bits", NAMES)
def test_rounding_is_to_the_middles_of_cells(bits: int) -> None:
    end = end_of(bits)
    u = torch.linspace(-1.5 * end, 1.5 * end, 1001)
    found = middles(levels(u, bits), bits)
    assert len(set(found.tolist())) == 2**bits
    inside = u.abs() < end
    assert ((found - u)[inside].abs() <= end / 2**bits * 1.0001).all()
    assert torch.equal(middles(levels(found, bits), bits), found)
    # the ends of least error: wider and narrower ones are worse
    gauss = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    error = (middles(levels(gauss, bits), bits) - gauss).square().mean()
    for factor in (0.85, 1.15):
        scaled = gauss / factor
        other = ((middles(levels(scaled, bits), bits) - scaled) * factor).square().mean()
        assert other > error


def test_the_gradient_passes_between_the_ends_alone() -> None:
    one = Ranged(nn.Identity(), 4, 2)
    u = torch.tensor([[0.3, -1.9, 2.1, -7.0]], requires_grad=True)
    one.eval()(u).sum().backward()
    assert u.grad is not None
    assert u.grad.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("bits", NAMES)
def test_the_wire_loses_nothing_more(bits: int) -> None:
    one = encoder(bits)
    z_BC = one.train()(images(6)).detach()
    wire = codec.of_rows(NAMES[bits], comm(bits), 3, 12, smashed=True)
    payload = wire.encode(z_BC)
    assert payload.shape == (2, -(-36 * bits // 32) * 4 + 4)
    assert torch.equal(wire.decode(payload), z_BC)
    short = torch.zeros_like(payload)
    trust.mark(short)
    assert not trust.sound(wire.decode(short), 1e4)
    bad = z_BC.clone()
    bad[4, 3] = math.nan
    assert not trust.sound(wire.decode(wire.encode(bad))[3:], 1e4)
    assert torch.equal(wire.decode(wire.encode(bad))[:3], z_BC[:3])  # another UE's


@pytest.mark.parametrize("bits", NAMES)
def test_the_quantiser_that_is_exported_is_the_one_of_training(bits: int) -> None:
    from csipipe import models

    model = Autoencoder(SMALL, nn.Sequential(*models.build_tail(SMALL, 0)), bits)
    model.encoder.train()(images())
    model.eval()
    quantiser = trained_for(model)
    assert quantiser is not None
    pair = Pair.of(model, quantiser)
    sent = run(pair.encoder, images())
    assert sent.shape == (40, 12 * bits)
    z_BC = run(model.encoder, images())
    torch.testing.assert_close(quantiser.from_bits(sent), z_BC, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(pair.decoder, sent), run(model, images()), rtol=1e-4, atol=1e-5)
    plain = Pair.of(model)  # whose codeword crosses as it was before it was rounded
    assert isinstance(model.encoder, Ranged)
    u_BC = model.encoder.unrounded(images()).detach().clamp(-end_of(bits), end_of(bits))
    torch.testing.assert_close(run(plain.encoder, images()), u_BC)


def test_a_codec_alone_trains_no_ranges() -> None:
    int8 = CodecSettings(smashed="int8")
    assert Settings(comm=CommSettings(codec=int8)).feedback_bits is None
    assert Settings(comm=CommSettings(codec=int8, scale="range")).feedback_bits == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(comm=CommSettings(scale="range")), "comm.codec.smashed is None; ranges are for"),
        (
            Settings(comm=CommSettings(scale="range", codec=CodecSettings(smashed="topk"))),
            "comm.codec.smashed is topk; ranges are for smashed data in int8, int4 or int2",
        ),
        (
            Settings(method="fedavg", comm=CommSettings(scale="range")),
            "comm.codec.smashed is None; ranges are for",
        ),
    ],
)
def test_ranges_without_levels_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.check_comm()
