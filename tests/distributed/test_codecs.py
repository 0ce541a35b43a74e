"""What crosses is what the codecs say: bytes on the wire, in the ledger and planned are the same,
and so is the result wherever UEs and stages are."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bits import assert_same
from harness import run_world
from runs import joined, small, splits, unsplit

from csipipe.comm import codec
from csipipe.comm.channel import SLOTS
from csipipe.comm.ledger import COUNTED, PAPER, PHASES, UP, Kind
from csipipe.comm.world import World
from csipipe.methods.cost import bytes_exchanged
from csipipe.settings.config import CodecSettings, CommSettings, Placement, Settings
from csipipe.settings.tables import METHODS


def setting(
    method: str, codecs: list[str], placement: Placement = "apart", **comm: Any
) -> Settings:
    """A run whose kinds of messages have these codecs, in order."""
    crosses = METHODS[method].crosses
    named = CodecSettings(**dict(zip(crosses, codecs * len(crosses), strict=False)))
    stages = min(2, METHODS[method].stages)
    return small(
        method,
        comm={"codec": named, **comm},
        topology={"stages": stages, "placement": placement},
        train={"iterations": 4},
    )


def runs(placement: Placement) -> dict[str, Settings]:
    """Every codec, and stochastic rounding."""
    found = {name: setting("csilocal", [name], placement) for name in ("fp32", "int8")}
    found["mixed"] = setting("csilocal", ["int2", "topk", "bf16", "int8"], placement, scale="ue")
    found["range"] = setting("csilocal", ["int4", "int8"], placement, scale="range", noise=0.1)
    noisy = ["int8", "int4", "int2", "int4"]
    return found | {"stochastic": setting("csilocal", noisy, placement, rounding="stochastic")}


def federated() -> dict[str, Settings]:
    found = {name: setting("fedavg", [name]) for name in ("fp32", "int8", "topk")}
    found["feedback"] = setting(
        "fedgradper", ["int4", "int2"], rounding="stochastic", error_feedback=True
    )
    return found


def listened(world: World, found: dict[str, Settings]) -> dict[str, Any]:
    """One rank of some runs, and the bytes that it sent to other ranks, by kind of message."""
    sent: Counter[int] = Counter()
    send = dist.isend

    def listen(tensor: torch.Tensor, to: int, group: Any = None, tag: int = 0) -> Any:
        sent[tag // SLOTS] += tensor.nbytes
        return send(tensor, to, group, tag)

    setattr(dist, "isend", listen)  # noqa: B010  # it has a type
    return {"runs": splits(world, found), "sent": sent}


@cache
def apart() -> list[dict[str, Any]]:
    return run_world(4, listened, runs("apart"), timeout=120)


def of_all(ranks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return joined([rank["runs"][name] for rank in ranks])


def check_ledger(
    ranks: list[dict[str, Any]], found: dict[str, Settings], lent: tuple[Kind, ...] = ()
) -> None:
    """Planned, counted and sent bytes are the same.

    Args:
        lent: kinds that cross once more when weights are saved, after the ledger was read.
    """
    ledgers = {name: of_all(ranks, name)["ledger"] for name in found}
    training = PHASES.index("training")
    for name, settings in found.items():
        planned = bytes_exchanged(settings)
        for way, kinds in {"up": set(UP) & set(PAPER), "down": set(PAPER) - set(UP)}.items():
            rows = [COUNTED.index(kind) for kind in kinds]
            counted = int(ledgers[name][training, rows, :, 1].sum())
            assert counted == planned[way], (name, way)
    for kind in (kind for kind in COUNTED if kind not in lent):
        counted = sum(
            int(ledger[:, COUNTED.index(kind), :, 1].sum()) for ledger in ledgers.values()
        )
        assert counted == sum(rank["sent"][kind.value] for rank in ranks), kind


def test_the_ledger_counts_the_bytes_that_cross() -> None:
    check_ledger(apart(), runs("apart"))
    scalars = {name: of_all(apart(), name)["ledger"][..., 0] for name in runs("apart")}
    for counted in scalars.values():  # the paper's count, however they are written
        assert torch.equal(counted, scalars["fp32"])


def test_the_ledger_counts_the_bytes_of_updates() -> None:
    found = federated()
    ranks = run_world(3, listened, found, timeout=120)
    check_ledger(ranks, found)
    losses = {name: of_all(ranks, name)["losses"] for name in found}
    assert losses["int8"][-1] == pytest.approx(losses["fp32"][-1], rel=0.05)
    assert losses["int8"] != losses["fp32"]


@pytest.mark.parametrize("name", ["mixed", "range", "stochastic"])
def test_a_placement_changes_no_bit(name: str) -> None:
    wanted = of_all(apart(), name)
    found = joined([r[name] for r in run_world(2, splits, {name: runs("together")[name]})])
    assert_same(found, wanted, "parameters", "losses", "evaluations", "ledger")


class Crossed(torch.autograd.Function):
    """What int8 does to values on their way up, and to gradients on their way back, row by row."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        one = codec.of_rows("int8", CommSettings(), 1, x.shape[1])
        return one.decode(one.encode(x.detach()))

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return Crossed.forward(None, gradient)


def test_it_is_the_unsplit_model_with_the_codec_in_between() -> None:
    found = of_all(apart(), "int8")
    wanted = unsplit(setting("csilocal", ["int8"]), crossing=Crossed.apply)
    plain = of_all(apart(), "fp32")
    for ours, theirs, without in zip(
        found["losses"], wanted["losses"], plain["losses"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)  # a level may differ by rounding
        assert ours == pytest.approx(without, rel=0.02)
    assert found["losses"] != plain["losses"]


def test_kinds_without_a_codec_of_their_own_follow_the_precision() -> None:
    settings = small(train={"precision": "bf16"}, comm={"codec": CodecSettings(smashed="int8")})
    names = codec.chosen(settings.comm, settings.train.precision)
    assert (names["smashed"], names["output"]) == ("int8", "bf16")
    assert Kind.STATISTICS.name.lower() not in names
