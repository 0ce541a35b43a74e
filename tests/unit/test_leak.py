"""What the BTS can reconstruct: the attacker finds what is there, and nothing where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trainedruns
from runs import small
from torch import Tensor, nn

from csipipe.comm.ledger import Kind
from csipipe.evaluation import attack, leak
from csipipe.evaluation.attack import Decoder
from csipipe.models.ranged import levels, middles
from csipipe.run.trained import read
from csipipe.settings.config import CodecSettings, CommSettings, Settings


def hidden(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six numbers of each row, and an image that they determine."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    mix = torch.randn(6, 32, generator=torch.Generator().manual_seed(99)) * 0.05
    return x, (0.5 + torch.tanh(x @ mix)).view(count, 2, 4, 4)


def test_the_attacker_finds_what_messages_determine_and_nothing_else() -> None:
    x, h = hidden(1200, 0)
    test_x, test_h = hidden(300, 1)
    assert attack.nmse(Decoder(x, h, 60), test_x, test_h) < 0.02
    # half of the numbers: what the others add can't be known
    half = attack.nmse(Decoder(x[:, :3], h, 60), test_x[:, :3], test_h)
    assert 0.3 < half < 0.8
    nothing = torch.randn(1200, 6, generator=torch.Generator().manual_seed(7))
    assert 0.9 < attack.nmse(Decoder(nothing, h, 60), test_x, test_h) < 1.3


def test_an_entry_that_is_constant_in_the_attackers_messages_is_left_out() -> None:
    x, h = hidden(1200, 0)
    test_x, test_h = hidden(300, 1)
    constant = torch.full((1200, 1), 0.7)
    found = attack.nmse(
        Decoder(torch.cat([x, constant], 1), h, 60), torch.cat([test_x, test_x[:, :1]], 1), test_h
    )
    assert found < 0.02


def test_the_network_finds_what_least_squares_miss() -> None:
    x, _ = hidden(1500, 0)
    test_x, _ = hidden(300, 1)

    def bent(v: Tensor) -> Tensor:
        return (0.5 + 0.1 * v.abs()[:, [0, 1, 2, 3] * 8]).view(len(v), 2, 4, 4)

    linear = attack.nmse(Decoder(x, bent(x), 1), test_x, bent(test_x))
    assert attack.nmse(Decoder(x, bent(x), 150), test_x, bent(test_x)) < 0.5 * linear


def test_a_network_that_learns_its_rows_by_heart_is_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 6, generator=generator)
    h = torch.rand(100, 2, 4, 4, generator=generator)  # nothing to do with x
    decoder = Decoder(x, h, 20)
    found = attack.nmse(decoder, x[90:], h[90:])  # what it doesn't learn from
    for value in decoder.rest[-1].parameters():
        nn.init.zeros_(value)
    assert found <= attack.nmse(decoder, x[90:], h[90:])


def test_messages_cross_with_the_runs_noise_and_codecs() -> None:
    z = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    plain = leak.Crossing(trained(), 0)
    assert torch.equal(plain(z, Kind.SMASHED), z)
    noisy = leak.Crossing(trained(noise=0.5), 0)
    added = noisy(z, Kind.SMASHED) - z
    assert added.square().mean().sqrt() / z.square().mean().sqrt() == pytest.approx(0.5, abs=0.1)
    g = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noisy(g, Kind.OUTPUT_GRADIENT), g)
    rounded = leak.Crossing(trained(codec=CodecSettings(smashed="int8")), 0)
    steps = z.abs().amax(1, keepdim=True) / 127
    assert ((rounded(z, Kind.SMASHED) - z).abs() <= steps / 2 * 1.001).all()
    assert not torch.equal(rounded(z, Kind.SMASHED), z)
    odd = rounded(z[:19], Kind.SMASHED)  # the last message is filled up
    assert torch.equal(odd, rounded(z, Kind.SMASHED)[:19])


def test_a_codeword_trained_for_its_bits_crosses_as_it_is_and_noise_is_rounded_too() -> None:
    z = middles(torch.arange(480).view(20, 24) % 16, 4)
    comm: dict[str, Any] = {"scale": "range", "codec": CodecSettings(smashed="int4")}
    assert torch.equal(leak.Crossing(trained(**comm), 0)(z, Kind.SMASHED), z)
    noisy = leak.Crossing(trained(**comm, noise=0.5), 0)(z, Kind.SMASHED)
    assert not torch.equal(noisy, z)
    assert torch.equal(middles(levels(noisy, 4), 4), noisy)


def test_a_gradient_that_is_never_sent_has_no_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train_samples": 80, "test_samples": 20}
    trainedruns.finish(tmp_path / "run", data=data, train={"freeze": "encoder,tail"})
    assert leak.main([str(tmp_path / "run"), "--steps", "1"]) == 0
    [row] = json.loads((tmp_path / "run" / "leak" / "leak.json").read_text())
    for found in (row["known"], row["unknown"]):
        assert found["smashed"] is not None
        assert found["gradient"] is found["both"] is None
    assert row["codecs"] == "fp32, —"
    assert capsys.readouterr().out.count("—") == 5


def test_the_attackers_rows_are_those_of_the_other_ues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Tensor] = []
    encoders: list[dict[str, Tensor]] = []
    messages = attack.messages

    def noted(model: Any, objective: Any, h_NAD: Tensor, wire: Any) -> attack.Seen:
        rows.append(h_NAD.flatten(1))
        encoders.append(model.encoder.state_dict())
        return messages(model, objective, h_NAD, wire)

    monkeypatch.setattr(attack, "messages", noted)
    monkeypatch.setattr(leak, "_OWN", 30)  # of three UEs
    trainedruns.finish(tmp_path / "run", data={"train_samples": 80, "test_samples": 20})
    assert leak.main([str(tmp_path / "run"), "--ue", "2", "--steps", "1"]) == 0
    [wanted] = read(tmp_path / "run").models([2])
    for name, weight in wanted.encoder.state_dict().items():
        assert torch.equal(encoders[0][name], weight)
    victim, *own = rows  # the encoder is known, then unknown
    assert [len(victim), *map(len, own)] == [18, 30, 30]  # none of the held-out ones
    assert all(torch.cdist(one, victim).min() > 1e-3 for one in own)


def trained(**comm: Any) -> Settings:
    return replace(small(), comm=CommSettings(**comm))


def test_leak_reports_every_run_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "clear", tmp_path / "noisy"]
    for folder, noise in zip(folders, (0.0, 4.0), strict=True):
        data = {"train_samples": 400, "test_samples": 20}
        trainedruns.finish(folder, data=data, comm={"noise": noise})
    assert leak.main([str(folders[0]), "--compare", str(folders[1]), "--steps", "20"]) == 0
    clear, noisy = json.loads((folders[0] / "leak" / "leak.json").read_text())
    assert (clear["noise"], noisy["noise"]) == (0, 4)
    assert clear["known"]["smashed"] < noisy["known"]["smashed"] - 1  # dB
    assert clear["known"]["smashed"] < clear["unknown"]["smashed"]
    assert clear["codecs"] == "fp32, fp32"
    said = capsys.readouterr().out
    assert "encoder unknown" in said
    assert "noisy" in said
    for arguments, what in (
        (["--ue", "4"], "UEs 0 … 3"),
        (["--steps", "0"], "--steps is 0"),
        (["--comm.noise", "-1"], "comm.noise is -1"),
    ):
        assert leak.main([str(folders[0]), *arguments]) == 1
        assert what in capsys.readouterr().err
    trainedruns.finish(tmp_path / "fedavg", "fedavg", data={"train_samples": 80})
    assert leak.main([str(tmp_path / "fedavg")]) == 1
    assert "sends no smashed data" in capsys.readouterr().err
