"""One run over emulated links: its ranks started, a link troubled in the middle, what came of it.

Ranks are started as DeepSpeed's launcher starts them, so that rank 0 holds the key-value store.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csipipe.files import write_file
from csipipe.links import network
from csipipe.links.network import Link, Network
from csipipe.reports.start import ended_by_signals
from csipipe.settings import commandline
from csipipe.settings.config import Settings

_PORT = 29500
_POLL = 0.1
_ENDING = 20.0
"""Seconds for the other ranks to end once one has."""


@dataclass(frozen=True)
class Trouble:
    """A link that breaks for a while, or gets slow."""

    host: int
    at: float
    lasting: float
    rate: float | None = None

    @classmethod
    def read(cls, text: str, hosts: int) -> Trouble:
        """From `UE:AT:FOR[:RATE]`; raises ValueError."""
        parts = text.split(":")
        try:
            host, at, lasting = int(parts[0]), float(parts[1]), float(parts[2])
            slow = network.rate(parts[3]) if len(parts) > 3 else None
            if len(parts) > 4 or not 0 <= host < hosts or min(at, lasting) < 0:
                raise ValueError("out of range")
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"--trouble is {text!r} ({error}); expected UE:AT:FOR or UE:AT:FOR:RATE, a UE rank "
                f"0 … {hosts - 1}, two numbers of seconds and a rate: 0:10:20 or 0:10:20:100kbit."
            ) from error
        return cls(host, at, lasting, slow)


@dataclass(frozen=True)
class Found:
    """What a run over links came to.

    Attributes:
        seconds: of an iteration, median; NaN: none was finished.
        overhead: bytes on the UE ranks' links for each that the ledger counts.
        error: what the run said when it failed; empty: it finished.
    """

    seconds: float
    in_all: float
    overhead: float
    error: str = ""


def train(
    settings: Settings,
    links: Sequence[Link],
    folder: Path,
    name: str,
    trouble: Trouble | None = None,
) -> Found:
    """Train over these links, in `folder/name`, or `name-2`, … where there is one already.

    Raises:
        ValueError, OSError: networks that can't be made.
    """
    places = (folder / (f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    place = next(place for place in places if not place.exists())
    settings = replace(settings, run=replace(settings.run, dir=str(place)))
    config, log = folder / f"{place.name}.yaml", folder / f"{place.name}.log"
    write_file(config, commandline.to_yaml(settings))
    with ended_by_signals(), Network(links) as net, log.open("w") as output:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(settings.stages + len(links)):
                words = _words(net, settings, config, rank)
                environment = _environment(rank, settings.stages + len(links))
                processes.append(
                    subprocess.Popen(
                        words,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
            _attend(processes, net, place, trouble)
        finally:
            _end(processes)
        crossed = sum(sum(net.crossed(host)) for host in range(len(links)))
    return _found(place, log, crossed)


def _words(net: Network, settings: Settings, config: Path, rank: int) -> list[str]:
    inside = ["ip", "netns", "exec", net.of_rank(rank, settings.stages)]
    train = [sys.executable, "-m", "csipipe", "train", "--config", str(config)]
    return [*inside, *train, f"--local_rank={rank}"]


def _environment(rank: int, size: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_SIZE": str(size),
        "MASTER_ADDR": network.BTS,
        "MASTER_PORT": str(_PORT),
        "GLOO_SOCKET_IFNAME": network.INTERFACE,
    }


def _attend(
    processes: Sequence[subprocess.Popen[bytes]], net: Network, place: Path, trouble: Trouble | None
) -> None:
    """Wait until the ranks have ended, and trouble a link on the way."""
    steps = list(_steps(net, trouble)) if trouble else []
    began = gone = math.inf
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if began == math.inf and (place / "config.yaml").exists():
            began = now
        while steps and now >= began + steps[0][0]:
            steps.pop(0)[1]()
        if any(process.poll() for process in processes):
            gone = min(gone, now)
        if now > gone + _ENDING:
            return  # one failed, and a link may be broken: the others needn't learn of it
        time.sleep(_POLL)


def _steps(net: Network, trouble: Trouble) -> Iterator[tuple[float, Callable[[], None]]]:
    host, link = trouble.host, net.links[trouble.host]
    if trouble.rate is None:
        yield trouble.at, lambda: net.connect(host, whole=False)
        yield trouble.at + trouble.lasting, lambda: net.connect(host, whole=True)
    else:
        slow = Link(trouble.rate, trouble.rate, link.delay)
        yield trouble.at, lambda: net.shape(host, slow)
        yield trouble.at + trouble.lasting, lambda: net.shape(host, link)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _found(place: Path, log: Path, crossed: int) -> Found:
    said = [line for line in log.read_text(errors="replace").splitlines() if "error:" in line]
    summary = place / "summary.json"
    if not summary.is_file():
        error = said[0].partition("error:")[2].strip() if said else "it ended without a word"
        return Found(math.nan, math.nan, math.nan, f"{error} (see {log})")
    content = json.loads(summary.read_text())
    counted = sum(
        sum(content[part]["bytes"].values())
        for part in ("exchanged", "exchanged_buffers", "exchanged_evaluation")
    )
    return Found(
        content["seconds_per_iteration"], content["seconds_total"], crossed / max(counted, 1)
    )
