"""The paper's totals of exchanged parameters, from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csipipe.methods.cost import (
    bytes_exchanged,
    bytes_per_iteration,
    exchanged,
    exchanged_per_iteration,
    feedback_bits,
    shared_parts,
)
from csipipe.methods.roster import drawn
from csipipe.settings.config import (
    CodecSettings,
    CommSettings,
    ModelSettings,
    Settings,
    TopologySettings,
    TrainSettings,
)
from csipipe.settings.tables import METHODS


def paper(method: str, c: int = 512) -> Settings:
    return Settings(
        method=method,
        model=ModelSettings(c1=c, c2=c, angles=32, delays=32),
        topology=TopologySettings(ues=10),
        train=TrainSettings(batch_size=800),
    )


@pytest.mark.parametrize(
    ("method", "iterations", "billions", "printed"),
    [
        ("csilocal", 1200, 19.6608, 19.66),
        ("fedavg", 560, 47.0664, 47.06),
        ("fedprox", 455, 38.2414, 38.24),
    ],
)
def test_the_headline_to_every_printed_digit(
    method: str, iterations: int, billions: float, printed: float
) -> None:
    total = iterations * sum(exchanged_per_iteration(paper(method)).values())
    assert round(total / 1e9, 4) == billions
    assert total // 10**7 / 100 == printed  # the paper truncates


def test_personal_encoders_are_not_exchanged() -> None:
    for method in METHODS:
        if method.startswith("fed"):
            each = 10 * (3_153_224 if method.endswith("per") else 4_202_354)
            assert exchanged_per_iteration(paper(method)) == {"up": each, "down": each}


def test_what_crosses_of_every_method() -> None:
    crossing = {method: exchanged_per_iteration(paper(method, 256)) for method in METHODS}
    assert crossing["centralised"] == {"up": 0, "down": 0}
    assert crossing["csilocal"] == {"up": 10 * 800 * 512, "down": 10 * 800 * 512}
    assert crossing["fedprox"] == {"up": 21_046_900, "down": 21_046_900}
    assert shared_parts(paper("csilocal")) == (0, 0)


@pytest.mark.parametrize(
    ("freeze", "up", "down"),
    [
        ("tail", 512 + 256, 256 + 512),
        ("encoder", 512 + 256, 256),  # the tail learns, z's gradient would be the encoder's
        ("encoder,tail", 512, 256),
        ("encoder,head", 512 + 256, 256),
    ],
)
def test_gradients_cross_where_something_before_them_learns(
    freeze: str, up: int, down: int
) -> None:
    one = paper("csilocal")
    settings = replace(
        one, model=replace(one.model, c2=256), train=replace(one.train, freeze=freeze)
    )
    assert exchanged_per_iteration(settings) == {"up": 8000 * up, "down": 8000 * down}
    sizes = bytes_per_iteration(settings)
    assert sizes == {"up": 4 * 8000 * up, "down": 4 * 8000 * down}


def test_bytes_of_codecs_by_hand() -> None:
    one = CodecSettings(smashed="int8", output="int4", smashed_gradient="topk")
    settings = replace(paper("csilocal"), comm=CommSettings(codec=one, topk=0.125))
    ues, messages, rows, c = 10, 4, 200, 512
    smashed = messages * rows * (c + 4)
    output = messages * rows * (c // 2 + 4)
    gradient = messages * rows * 64 * (2 + 4)
    assert bytes_per_iteration(settings) == {
        "up": ues * (smashed + messages * rows * c * 4),
        "down": ues * (output + gradient),
    }
    assert feedback_bits(settings) == 8 * (c + 4)
    federated = replace(
        paper("fedavg"), comm=CommSettings(codec=CodecSettings(update="int2"), scale="ue")
    )
    d = 4_202_354
    assert bytes_per_iteration(federated) == {"up": 10 * (-(-d // 16) * 4 + 4), "down": 40 * d}
    plain = exchanged_per_iteration(paper("fedgradper"))
    assert bytes_per_iteration(paper("fedgradper")) == {way: 4 * n for way, n in plain.items()}


def test_who_was_absent_receives_what_it_missed() -> None:
    """2 of 5 UEs, with seed 0 in turn 0 and 4, 1 and 3, 2 and 4: all of the last four are back."""
    for method in METHODS:
        if method.startswith("fed"):
            some = replace(
                paper(method),
                topology=TopologySettings(ues=5, participants=2),
                train=TrainSettings(iterations=3),
            )
            d, _ = shared_parts(some)
            assert exchanged(some) == {"up": 6 * d, "down": 6 * d + 4 * d}
            assert bytes_exchanged(some) == {"up": 24 * d, "down": 40 * d}
            coarse = replace(some, train=TrainSettings(iterations=3, precision="bf16"))
            assert bytes_exchanged(coarse) == {"up": 12 * d, "down": 20 * d}
    split = replace(paper("csilocal"), topology=TopologySettings(ues=5, participants=2))
    each = 2 * 800 * 1024
    assert exchanged_per_iteration(split) == {"up": each, "down": each}
    assert exchanged(split) == {"up": 500 * each, "down": 500 * each}


def test_what_splitfed_averages_by_hand() -> None:
    """E = 10, in 45 iterations of which the last 12 are the UEs' own: 3 times in 30."""
    settings = replace(
        paper("splitfed", 256),
        train=TrainSettings(
            iterations=45, batch_size=800, aggregate_every=10, personal_iterations=12
        ),
        comm=CommSettings(codec=CodecSettings(update="int8"), scale="ue"),
    )
    # encoder and head: 2048·256 + 256 and 256·2048 + 2048, and the encoder's convolution
    ends = 2 * 2048 * 256 + 256 + 2048 + (2 * 2 * 9 + 2 + 4)
    assert shared_parts(settings) == (ends, ends)
    split = 10 * 800 * 512
    assert exchanged_per_iteration(settings) == {"up": split, "down": split}
    assert exchanged(settings) == dict.fromkeys(("up", "down"), 45 * split + 3 * 10 * ends)
    assert bytes_per_iteration(settings) == {"up": 4 * split, "down": 4 * split}
    padded = -(-ends // 4) * 4 + 4
    assert bytes_exchanged(settings) == {
        "up": 4 * 45 * split + 3 * 10 * padded,
        "down": 4 * (45 * split + 3 * 10 * ends),
    }
    # 2 of 5 UEs: who wasn't in the round before, and after the last one all but its two
    some = replace(settings, topology=TopologySettings(ues=5, participants=2), comm=CommSettings())
    back = [len({*drawn(some, 10 * k)} - {*drawn(some, 10 * k - 1)}) for k in (1, 2)]
    down = 45 * split // 5 + (3 * 2 + sum(back) + 3) * ends
    assert exchanged(some) == {"up": 45 * split // 5 + 3 * 2 * ends, "down": down}
