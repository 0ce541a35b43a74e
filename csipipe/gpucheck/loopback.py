"""How fast tensors get to the host and, by csipipe's channels over gloo, to another process."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from csipipe.comm.channel import Channel, Peer
from csipipe.comm.codec import Plain
from csipipe.comm.ledger import Kind
from csipipe.comm.world import World
from csipipe.device import download, synchronize, upload
from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.timing import milliseconds

_LIMIT = 25.0


def rates(step: Step) -> None:
    """Note how fast tensors move; a channel that is silent has failed."""
    device, rows = step.device, 64 if step.tiny else 8000
    size = rows * 2048 * 4
    x = torch.randn(rows, 2048, device=device)
    host = x.cpu()
    pinned = host.pin_memory() if device.type == "cuda" else host

    def down() -> None:
        download(x)[1]()

    def up() -> None:
        upload(pinned, device)[1]()

    ways = {
        f"{size / 2**20:.0f} MiB to the host, pinned": down,
        f"{size / 2**20:.0f} MiB from the host, pinned": up,
        f"{size / 2**20:.0f} MiB to the host, as it is": lambda: x.cpu(),
        f"{size / 2**20:.0f} MiB from the host, as it is": lambda: host.to(device, copy=True),
    }
    for name, way in ways.items():
        step.add(name, f"{size / milliseconds(way, device, 5) / 1e6:.1f} GB/s")
    cases = [(kind, rows // 2, width) for kind in _devices(device) for width in (256, 2048)]
    for (kind, high, width), rate in zip(cases, _channels(cases), strict=False):
        name = f"channel over gloo, {high} × {width} fp32 on {kind}, both ways at once"
        if rate:
            step.add(name, f"{rate:.0f} MB/s each way")
        else:
            step.add(name, "failed", "ends well", False)


def _devices(device: torch.device) -> list[str]:
    return ["cpu"] if device.type == "cpu" else ["cpu", device.type]


def _channels(cases: list[tuple[str, int, int]]) -> list[float]:
    """MB/s each way between two processes, of each case that came to an end in time."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        ranks = [
            context.Process(target=_rank, args=(rank, store, cases, results)) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        try:
            while len(found) < len(cases):
                found.append(float(results.get(timeout=_LIMIT)))
        except queue.Empty:
            found.append(0.0)
        for process in ranks:
            process.join(5)
            process.kill()
    return found


def _rank(rank: int, store: str, cases: list[tuple[str, int, int]], results: Any) -> None:
    world = World(FileStore(store, 2), rank, 2, rank, 2)
    world.connect(_LIMIT)
    for case in cases:
        rate = _rate(world, *case)
        if rank == 0:
            results.put(rate)
    world.leave()


def _rate(world: World, name: str, rows: int, width: int) -> float:
    """MB/s each way of eight messages, the second time."""
    # with a number, as `pick_device` gives it: the channel's thread has to set it
    rank, device = world.rank, torch.device(name, 0) if name == "cuda" else torch.device(name)
    messages, shape = 8, (rows, width)
    channels = [
        Channel(
            kind, [Peer(1 - rank, slice(0, rows))], shape, messages, Plain(torch.float32), device
        )
        for kind in (Kind.ACTIVATION, Kind.ACTIVATION_GRADIENT)
    ]
    out, back = channels[rank], channels[1 - rank]
    x = torch.randn(shape, device=device)
    for timed in (False, True):
        world.ready(f"{name} {width} {timed}")
        before = time.perf_counter()
        back.post()
        for m in range(messages):
            out.send(m, x)
        for m in range(messages):
            back.receive(m)
        out.finish()
        synchronize(device)
    return messages * rows * width * 4 / (time.perf_counter() - before) / 1e6
