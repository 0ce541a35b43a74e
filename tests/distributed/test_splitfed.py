"""SplitFed: CSILocal whose encoders and heads are averaged; identities, ledger, placement."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from bits import assert_same
from harness import run_world
from runs import CPU, joined, small, splits
from test_codecs import listened, of_all

from csipipe import methods
from csipipe.comm.ledger import COUNTED, PAPER, PHASES, UP, Kind
from csipipe.comm.world import World
from csipipe.methods.cost import bytes_exchanged, exchanged
from csipipe.settings.config import CodecSettings, Settings

ITERATIONS = 6
RESULTS = ("parameters", "losses", "evaluations", "files")


def splitfed(every: int = 1, personal: int = 0, **sections: Any) -> Settings:
    train = {
        "iterations": ITERATIONS,
        "aggregate_every": every,
        "personal_iterations": personal,
        **sections.pop("train", {}),
    }
    return small("splitfed", train=train, **sections)


def csilocal(**sections: Any) -> Settings:
    return small(train={"iterations": ITERATIONS, **sections.pop("train", {})}, **sections)


SOME = {"participants": 2}
ALONE = {"ues": 1}
STACKED = {"stacked": "always"}
CODECS = {
    "codec": CodecSettings(smashed="int8", update="int8", mean_update="int8"),
    "rounding": "stochastic",
    "error_feedback": True,
}


def runs() -> dict[str, Settings]:
    return {
        "csilocal": csilocal(),
        "never": splitfed(ITERATIONS + 1),
        "csilocal of some": csilocal(topology=SOME),
        "never, of some": splitfed(7, topology=SOME),
        "only personal": splitfed(personal=ITERATIONS),
        "every": splitfed(),
        "every third": splitfed(3),
        "then personal": splitfed(2, personal=3),
        "of some": splitfed(2, personal=1, topology=SOME),
        "int8": splitfed(2, comm=CODECS),
        "stacked": splitfed(2, train=STACKED),
        "one by one": splitfed(2),
        "frozen": splitfed(2, train={"freeze": "head"}),
    }


@cache
def found(ranks: int = 4) -> list[dict[str, Any]]:
    return run_world(ranks, listened, runs(), timeout=120)


def result(name: str) -> dict[str, Any]:
    return of_all(found(), name)


def parts_of(run: dict[str, Any], ue: int, parts: tuple[str, ...] = ("encoder", "head")) -> Any:
    """Weights and statistics of a UE, as they are saved."""
    state = run["files"][f"ue_{ue}.safetensors"]
    return {k: v for k, v in state.items() if k.startswith(parts) and "tracked" not in k}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("never", "csilocal"),
        ("only personal", "csilocal"),
        ("never, of some", "csilocal of some"),
    ],
)
def test_without_averaging_it_is_csilocal_to_the_bit(name: str, other: str) -> None:
    assert_same(result(name), result(other), *RESULTS)
    training = PHASES.index("training")
    ours, theirs = (result(one)["ledger"][training] for one in (name, other))
    assert torch.equal(ours, theirs)
