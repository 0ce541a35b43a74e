"""No channel sample, and nothing of another UE's, is in what crosses: every byte is read.

What a rank hands to torch.distributed is noted with its receiver, and the key-value store is read
as the file that it is in these tests, gloo's own entries included. A window of eight neighbouring
scalars that match bit by bit counts as found; the autoencoder's labels are its samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_world
from runs import CPU, follow, small

from csipipe import methods
from csipipe.comm.loopback import Loopback
from csipipe.comm.world import World
from csipipe.settings.config import Settings

EVERYONE = -1
WIDTH = 8
FEDERATED: list[str] = [
    "fedavg",
    "fedprox",
    "fedgrad",
    "fedavgper",
    "fedproxper",
    "fedgradper",
]
MULTIPLIERS = np.random.default_rng(0).integers(1, 2**63, WIDTH, dtype=np.uint64) * 2 + 1
Sent = dict[tuple[int, int], bytes]
"""By receiver (or EVERYONE) and bytes of a scalar."""
Wanted = list[tuple[int, np.ndarray]]
"""Bytes of a scalar, and fingerprints of what is looked for."""


def windows(words: np.ndarray) -> np.ndarray:
    """Fingerprints of all windows of WIDTH words."""
    found = np.lib.stride_tricks.sliding_window_view(words.astype(np.uint64), WIDTH)
    marks = np.zeros(len(found), np.uint64)
    for k in range(WIDTH):
        marks += found[:, k] * MULTIPLIERS[k]  # modulo 2^64
    return marks


def telling(words: np.ndarray) -> np.ndarray:
    """Fingerprints of those windows of which at least half the words differ."""
    found = np.lib.stride_tricks.sliding_window_view(words, WIDTH)
    kinds = 1 + (np.diff(np.sort(found, axis=1), axis=1) != 0).sum(axis=1)
    marks = np.unique(windows(words)[kinds >= WIDTH // 2])
    assert len(marks) > 100
    return marks


def encodings(rows: np.ndarray) -> Iterable[np.ndarray]:
    """Words of real rows in every type that could be sent."""
    for kind in (np.float32, np.float64, np.float16):
        yield rows.astype(kind).view(f"u{np.dtype(kind).itemsize}").ravel()
    yield torch.from_numpy(rows).bfloat16().view(torch.int16).numpy().view(np.uint16).ravel()


def holds(data: bytes, wanted: Wanted, aligned: bool = True) -> bool:
    """Whether a part of some rows is in `data`, at a multiple of a scalar's size if `aligned`."""
    for size, marks in wanted:
        for offset in range(1 if aligned else size):
            part = data[offset : offset + (len(data) - offset) // size * size]
            heard = np.frombuffer(part, f"u{size}")
            if len(heard) >= WIDTH and np.isin(marks, windows(heard)).any():
                return True
    return False


def overlap(one: bytes, other: bytes, size: int) -> bool:
    """Whether two streams of scalars of `size` bytes have a window in common."""
    a, b = (np.frombuffer(data, f"u{size}") for data in (one, other))
    assert len(b) > 100
    return bool(np.isin(telling(a), windows(b)).any())


def listen_to(name: str, sent: dict[tuple[int, int], list[bytes]]) -> None:
    """Note what is handed to a function of torch.distributed."""
    function = getattr(dist, name)

    def listen(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        to = arguments[0] if name in ("isend", "send") else EVERYONE
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        sent.setdefault((to, tensor.element_size()), []).append(data)
        return function(tensor, *arguments, **options)

    setattr(dist, name, listen)


def listen_to_oneself(rank: int, sent: dict[tuple[int, int], list[bytes]]) -> None:
    """Note what a rank's roles send to each other."""
    send = Loopback.isend

    def listen(loop: Loopback, rows: torch.Tensor, tag: int) -> Any:
        data = rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        sent.setdefault((rank, rows.element_size()), []).append(data)
        assert not rows.requires_grad
        return send(loop, rows, tag)

    Loopback.isend = listen  # type: ignore[assignment,method-assign]


def eavesdrop(world: World, runs: list[Settings], plant: str = "") -> list[dict[str, Any]]:
    """One rank of some runs: what it sent, its rows, and the whole key-value store.

    Args:
        plant: where UE ranks put a piece of a row: message, store, or a UE of another rank's
            smashed data in what the BTS sends down (neighbour).
    """
    sent: dict[tuple[int, int], list[bytes]] = {}
    for name in ("isend", "send", "all_reduce", "broadcast", "all_gather", "reduce"):
        listen_to(name, sent)
    listen_to_oneself(world.rank, sent)
    builders = [methods.prepare(settings, world.rank, world.size, CPU) for settings in runs]
    world.ready("data")
    world.connect(20.0)
    results = []
    for settings, build in zip(runs, builders, strict=True):
        sent.clear()
        worker: Any = build(world)
        half = worker.halves[-1]
        ues = getattr(half, "ues", [])
        if plant:
            leak(world, half, plant)
        follow(worker, settings.train.iterations)
        world.ready(f"store of {settings.method}")
        rows = [rows.numpy() for ue in ues for rows in (ue.rows, ue.holdout, half.test)]
        results.append(
            {
                "sent": {key: b"".join(parts) for key, parts in sent.items()},
                "rows": np.concatenate(rows) if rows else None,
                "store": Path(world.store.path).read_bytes(),  # type: ignore[attr-defined]
            }
        )
    world.leave()
    return results


def leak(world: World, half: Any, where: str) -> None:
    """Do what must be found."""
    ues = getattr(half, "ues", [])
    if where == "store" and ues:
        # not at a multiple of four
        world.store.set(f"x{world.rank}", b"..." + ues[0].rows[3].numpy().tobytes()[256:512])
    if where == "message" and ues:
        send, piece = half.ports.forward_out.send, ues[1].rows[3].flatten()[64:76]

        def spoiled(m: int, tensor: torch.Tensor) -> None:
            tensor = tensor.clone()
            tensor[2, 5:17] = piece
            send(m, tensor)

        half.ports.forward_out.send = spoiled
    if where == "neighbour" and not ues:
        take, give = half.ports.forward_in, half.ports.backward_out
        send = give.send

        def mixed(m: int, tensor: torch.Tensor) -> None:
            send(m, take._buffers[0].roll(len(tensor) // 2, 0))

        give.send = mixed


def check(ranks: list[dict[str, Any]], stages: int) -> None:
    """Nothing that is a UE's own left it, and the BTS passed nothing on."""
    rows = np.concatenate([rank["rows"] for rank in ranks if rank["rows"] is not None])
    assert len(rows) == 4 * 20 + 2 * 2 * 20  # four UEs'; the test set, twice on two ranks
    wanted = [(words.itemsize, telling(words)) for words in encodings(rows)]
    up: dict[int, dict[int, bytes]] = {}
    for number, rank in enumerate(ranks):
        sent: Sent = rank["sent"]
        for (to, size), data in sent.items():
            assert not holds(data, wanted), f"rank {number} sends samples to rank {to}"
            if number >= stages:
                assert to < stages, "UEs don't talk to each other"
                if to != EVERYONE and size < 8:  # figures are float64
                    mine = up.setdefault(number, {})
                    mine[size] = mine.get(size, b"") + data
    assert sum(len(data) for mine in up.values() for data in mine.values()) > 10_000
    store = ranks[0]["store"]
    assert b"messages" in store
    assert not holds(store, wanted, aligned=False), "the key-value store holds samples"
    for bts in ranks[:stages]:
        for (to, size), data in bts["sent"].items():
            for other, messages in up.items():
                if to >= stages and to != other and size in messages:
                    assert not overlap(data, messages[size], size), f"rank {to} hears {other}"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_csilocal_sends_nothing_that_is_a_ues_own(precision: str) -> None:
    train = {"iterations": 3, "on_bad_ue": "drop", "precision": precision}
    heard = run_world(4, eavesdrop, [small(train=train)])
    check([rank[0] for rank in heard], stages=2)


@pytest.mark.parametrize(
    "chosen", [["fedgradper"], pytest.param(FEDERATED, marks=pytest.mark.long)]
)
def test_federated_methods_send_nothing_that_is_a_ues_own(chosen: list[str]) -> None:
    one: dict[str, Any] = {"topology": {"stages": 1}, "train": {"iterations": 2}}
    heard = run_world(3, eavesdrop, [small(method, **one) for method in chosen])
    for k in range(len(chosen)):
        check([rank[k] for rank in heard], stages=1)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("message", "rank 1 sends samples to rank 0"),
        ("store", "the key-value store holds samples"),
        ("neighbour", "rank . hears ."),
    ],
)
def test_what_is_planted_is_found(where: str, what: str) -> None:
    settings = small(topology={"stages": 1}, train={"iterations": 1, "micro_batches": 1})
    heard = run_world(3, eavesdrop, [settings], where)
    with pytest.raises(AssertionError, match=what):
        check([rank[0] for rank in heard], stages=1)


@pytest.mark.parametrize(
    ("method", "plant"), [("csilocal", ""), ("csilocal", "message"), ("fedgradper", "")]
)
def test_roles_of_one_rank_send_each_other_nothing_that_is_a_ues_own(
    method: str, plant: str
) -> None:
    topology = {"stages": 1, "placement": "together"}
    settings = small(method, topology=topology, train={"iterations": 2})
    [[rank]] = run_world(1, eavesdrop, [settings], plant)
    wanted = [(words.itemsize, telling(words)) for words in encodings(rank["rows"])]
    messages = rank["sent"][0, 4]
    assert len(messages) > 10_000
    assert holds(messages, wanted) == bool(plant)
