"""Who is to blame: chains of waiting ranks, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from csipipe.comm.blame import EVERYONE, PeerLost, Wait, find, now, waiting
from csipipe.comm.topology import Topology

ROLE = Topology(4, 2, 4).role


def wait(rank: int, peer: int, gone: bool = False) -> Wait:
    return Wait(peer, "smashed data", gone, f"{ROLE(rank)}, iteration 7")


def test_a_chain_ends_at_the_rank_that_waits_for_nobody() -> None:
    waits = {2: wait(2, 1), 1: wait(1, 0), 0: wait(0, 3)}
    verdict = find(waits, 2, 4, ROLE)
    assert verdict.text == (
        "UE rank 3 (UEs 2-3) is silent: BTS stage 0, iteration 7, waited for smashed data."
    )
    assert not verdict.final  # it may still say for whom it waits itself


def test_a_broken_connection_is_a_rank_that_is_gone() -> None:
    verdict = find({2: wait(2, 1), 1: wait(1, 0, gone=True)}, 2, 4, ROLE)
    assert verdict.text.startswith("BTS stage 0 is gone")
    assert verdict.gone


def test_a_circle_of_waits_is_a_lost_message() -> None:
    verdict = find({0: wait(0, 2), 1: wait(1, 0), 2: wait(2, 1)}, 0, 4, ROLE)
    assert verdict.final
    assert "a message was lost" in verdict.text
    assert "BTS stage 0, iteration 7, waits for smashed data from UE rank 2" in verdict.text


def test_a_rank_that_woke_up_too_late_is_the_silent_one() -> None:
    verdict = find({0: wait(0, 2), 2: wait(2, 0, gone=True)}, 2, 4, ROLE)
    assert verdict.text.startswith("UE rank 2 (UEs 0-1) is silent: BTS stage 0")


def test_in_a_collective_the_ranks_that_say_nothing_are_silent() -> None:
    verdict = find({0: wait(0, EVERYONE), 1: wait(1, EVERYONE)}, 0, 4, ROLE)
    assert verdict.text.startswith("UE rank 2 (UEs 0-1), UE rank 3 (UEs 2-3) is silent")


def test_in_a_collective_a_broken_connection_is_a_rank_that_is_gone() -> None:
    broken = {rank: wait(rank, EVERYONE, gone=True) for rank in range(2)}
    assert not find(broken, 0, 4, ROLE).final  # rank 2 may not have seen it
    verdict = find({**broken, 2: replace(wait(2, EVERYONE), over=False)}, 0, 4, ROLE)
    assert verdict.text.startswith("UE rank 3 (UEs 2-3) is gone")
    assert verdict.final
    # unless a rank that ran out of time broke it
    verdict = find({**broken, 2: wait(2, EVERYONE)}, 0, 4, ROLE)
    assert verdict.text.startswith("UE rank 3 (UEs 2-3) is silent")
    assert not verdict.final


def test_in_a_collective_a_rank_that_ran_out_of_time_knows_better() -> None:
    broken = {rank: wait(rank, EVERYONE, gone=True) for rank in (0, 2)}
    verdict = find({**broken, 1: wait(1, 3)}, 0, 4, ROLE)
    assert verdict.text.startswith("UE rank 3 (UEs 2-3) is silent: BTS stage 1")


def test_ranks_that_still_wait_may_be_lucky() -> None:
    circle = {0: wait(0, 2), 1: wait(1, 0), 2: replace(wait(2, 1), over=False)}
    verdict = find(circle, 0, 4, ROLE)
    assert "a message was lost" in verdict.text
    assert not verdict.final


def test_what_a_rank_waits_for_is_known_while_it_does() -> None:
    with waiting(2, "smashed data"):
        mine = now("BTS stage 0, iteration 7")
    assert mine == replace(wait(0, 2), over=False)
    assert now("BTS stage 0, iteration 7") is None


def test_gloos_words_tell_silence_from_absence() -> None:
    assert PeerLost("waiting", 1, "z", "Connection reset by peer").gone
    assert not PeerLost("waiting", 1, "z", "Timed out waiting 3000ms for recv").gone
    assert Wait.from_json(wait(0, 1).to_json()) == wait(0, 1)
