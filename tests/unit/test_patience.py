"""Waiting for a transfer whose `wait` doesn't hold the host up, as NCCL's."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch

from csipipe.comm import blame, patience


class Slow:
    """Work that is over after some seconds, as the GPU would say."""

    def __init__(self, seconds: float) -> None:
        self.over = time.monotonic() + seconds
        self.waited = False

    def is_completed(self) -> bool:
        return time.monotonic() >= self.over

    def wait(self) -> bool:
        self.waited = True
        return True


def test_the_host_waits_until_it_is_over() -> None:
    work = Slow(0.1)
    patience.wait(work, 20.0)
    assert work.is_completed()
    assert work.waited


def test_a_silent_rank_is_named_after_the_timeout_and_not_later() -> None:
    work, before = Slow(1000), time.monotonic()
    with (
        pytest.raises(blame.PeerLost, match=r"Timed out after 0\.2 s") as lost,
        blame.watch("waiting for activation from BTS stage 0", 0, "activation"),
    ):
        patience.wait(work, 0.2)
    assert time.monotonic() - before < 10
    assert not work.waited  # it would only tell the stream to wait, for ever
    assert lost.value.peer == 0
    assert not lost.value.gone


def test_gloo_waits_by_itself() -> None:
    work = Slow(1000)
    patience.wait(work, None)
    assert work.waited


def test_the_watchdog_speaks_after_the_rank_that_waits() -> None:
    assert patience.group_timeout("gloo", 300) == timedelta(seconds=300)
    assert patience.group_timeout("nccl", 300) == timedelta(seconds=630)


def test_a_receive_over_nccl_ends_after_run_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    from csipipe.comm.channel import Channel, Peer
    from csipipe.comm.codec import Plain
    from csipipe.comm.ledger import Kind

    group = torch.distributed
    monkeypatch.setattr(group, "get_backend", lambda _: "nccl")
    monkeypatch.setattr(group, "irecv", lambda *_: Slow(1000))
    peer, elsewhere = Peer(1, slice(0, 2), role="BTS stage 1"), torch.device("meta")
    channel = Channel(
        Kind.ACTIVATION, [peer], (2, 3), 1, Plain(torch.float32), elsewhere, timeout=0.2
    )
    channel.post()
    with pytest.raises(blame.PeerLost, match=r"activation from BTS stage 1: Timed out"):
        channel.receive(0)
