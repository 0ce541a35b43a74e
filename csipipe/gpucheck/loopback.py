"""How fast tensors get to the host and, by csipipe's channels over gloo, to another process."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from csipipe.comm.channel import Channel, Peer
from csipipe.comm.ledger import Kind
from csipipe.comm.world import World
from csipipe.device import download, upload
from csipipe.gpucheck.timing import milliseconds

_LIMIT = 40.0


def rates(device: torch.device, tiny: bool) -> dict[str, str]:
    """Lines for the page: what was moved, and how fast."""
    rows = 64 if tiny else 8000
    size = rows * 2048 * 4
    x = torch.randn(rows, 2048, device=device)
    host = x.cpu()
    pinned = host.pin_memory() if device.type == "cuda" else host

    def down() -> None:
        download(x)[1]()

    def up() -> None:
        upload(pinned, device)[1]()

    found = {
        f"{size / 2**20:.0f} MiB to the host, pinned": down,
        f"{size / 2**20:.0f} MiB from the host, pinned": up,
        f"{size / 2**20:.0f} MiB to the host, as it is": lambda: x.cpu(),
        f"{size / 2**20:.0f} MiB from the host, as it is": lambda: host.to(device, copy=True),
    }
    lines = {
        name: f"{size / milliseconds(way, device, 5) / 1e6:.1f} GB/s" for name, way in found.items()
    }
    for kind in dict.fromkeys(("cpu", device.type)):
        for width in (256, 2048):
            name = f"channel over gloo, {rows // 2} × {width} fp32 on {kind}, both ways at once"
            lines[name] = f"{_channel(kind, rows // 2, width):.0f} MB/s each way"
    return lines


def _channel(device: str, rows: int, width: int) -> float:
    """MB/s each way between two processes."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        ranks = [
            context.Process(target=_rank, args=(rank, store, device, rows, width, results))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        try:
            return float(results.get(timeout=_LIMIT))
        except queue.Empty:
            return float("nan")
        finally:
            for process in ranks:
                process.join(5)
                process.kill()


def _rank(rank: int, store: str, name: str, rows: int, width: int, results: Any) -> None:
    os.environ["DS_ACCELERATOR"] = name
    device = torch.device(name)
    world = World(FileStore(store, 2), rank, 2, rank, 2)
    world.connect(_LIMIT)
    messages, shape = 8, (rows, width)
    channels = [
        Channel(kind, [Peer(1 - rank, slice(0, rows))], shape, messages, torch.float32, device)
        for kind in (Kind.ACTIVATION, Kind.ACTIVATION_GRADIENT)
    ]
    out, back = channels[rank], channels[1 - rank]
    x = torch.randn(shape, device=device)
    for timed in (False, True):
        world.ready(str(timed))
        before = time.perf_counter()
        back.post()
        for m in range(messages):
            out.send(m, x)
        for m in range(messages):
            back.receive(m)
        out.finish()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - before
    if rank == 0:
        results.put(messages * rows * width * 4 / seconds / 1e6)
    world.leave()
