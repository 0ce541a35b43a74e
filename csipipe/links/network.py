"""Networks on one machine: the BTS's, and one of each UE rank, joined by links of a given rate.

Each is a network namespace of Linux. A UE rank's interface leads to a bridge in the BTS's; both
ends of that cable are shaped by tc: the UE's end is the uplink, the bridge's end the downlink. The
machine's own interfaces are never touched. Names begin with `csilink-` and the number of the
process that made them, so that what a killed one left behind is found, and removed, later.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "csilink-"
INTERFACE = "csi0"
"""What each network calls its own end; in the BTS's, the bridge."""
BTS = "10.77.0.1"
_PLACE = Path("/run/netns")
_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SHORTEST = 2e-3
"""Seconds of a link's rate that it sends at once after a pause."""
_FRAMES = 5_000
"""The same in bytes, at least: some whole frames."""
_QUEUE = "2000ms"
"""What waits before a link, at most; with less, slow links lose many packets."""


@dataclass(frozen=True)
class Link:
    """A UE rank's link to the BTS: bit/s, seconds one way."""

    up: float
    down: float
    delay: float = 0.0


def rate(text: str) -> float:
    """Bit/s of a rate such as 10mbit.

    Raises:
        ValueError: it can't be read, or isn't positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", text.strip().lower())
    if not found or not float(found[1]):
        raise ValueError(
            f"{text!r} is no rate; give a number and its unit, one of {', '.join(_UNITS)}: 10mbit."
        )
    return float(found[1]) * _UNITS[found[2]]


def check_machine() -> None:
    """Refuse (ValueError) a machine or a user that can't have networks of their own."""
    if os.geteuid() != 0:
        raise ValueError(
            "links needs root: it makes network namespaces. Start it with sudo -E env PATH=$PATH."
        )
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ValueError(f"links needs {tool}, which isn't here: apt-get install iproute2.")


def clean() -> list[str]:
    """Remove the networks of processes that are gone; returns their names."""
    removed = []
    for place in sorted(_PLACE.glob(f"{PREFIX}*")):
        found = re.fullmatch(rf"{PREFIX}(\d+)-\w+", place.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _run("ip", "netns", "del", place.name)
            removed.append(place.name)
    return removed


class Network:
    """The BTS's network and one of each UE rank; they end with the context.

    Raises:
        ValueError: the kernel can't emulate these links; says what is missing.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = list(links)
        self.bts = f"{PREFIX}{os.getpid()}-bts"
        self.ues = [f"{PREFIX}{os.getpid()}-ue{n}" for n in range(len(links))]

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.ues, self.bts):
            if (_PLACE / name).exists():
                _run("ip", "netns", "del", name)

    def of_rank(self, rank: int, stages: int) -> str:
        """The network of a rank: BTS stages come first."""
        return self.bts if rank < stages else self.ues[rank - stages]

    def shape(self, ue: int, link: Link, verb: str = "change") -> None:
        """Give a UE rank's link these rates."""
        self.links[ue] = link
        ends = ((self.ues[ue], INTERFACE, link.up), (self.bts, f"ue{ue}", link.down))
        for name, interface, speed in ends:
            burst = max(_FRAMES, round(speed / 8 * _SHORTEST))
            bucket = ("tbf", "rate", f"{speed:.0f}bit", "burst", f"{burst}b", "latency", _QUEUE)
            _tc(name, "qdisc", verb, "dev", interface, "root", "handle", "1:", *bucket)
            if link.delay and verb == "add":
                wait = ("netem", "delay", f"{link.delay * 1e3:.3f}ms", "limit", "100000")
                parent = ("parent", "1:1", "handle", "10:")
                _tc(name, "qdisc", "add", "dev", interface, *parent, *wait)

    def connect(self, ue: int, whole: bool) -> None:
        """Break a UE rank's link, or mend it; connections stay open and wait."""
        _run("ip", "-n", self.bts, "link", "set", f"ue{ue}", "up" if whole else "down")

    def crossed(self, ue: int) -> tuple[int, int]:
        """Bytes that a UE rank's interface has sent and received, with all headers."""
        folder = f"/sys/class/net/{INTERFACE}/statistics"
        files = [f"{folder}/{way}_bytes" for way in ("tx", "rx")]
        sent, received = _run("ip", "netns", "exec", self.ues[ue], "cat", *files).split()
        return int(sent), int(received)

    def _make(self) -> None:
        self._network(self.bts)
        _run("ip", "-n", self.bts, "link", "add", INTERFACE, "type", "bridge")
        self._address(self.bts, BTS)
        for number, (name, link) in enumerate(zip(self.ues, self.links, strict=True)):
            self._network(name)
            port = f"ue{number}"
            cable = ("link", "add", INTERFACE, "netns", name, "type", "veth")
            _run("ip", *cable, "peer", "name", port, "netns", self.bts)
            _run("ip", "-n", self.bts, "link", "set", port, "master", INTERFACE, "up")
            self._address(name, f"10.77.0.{number + 2}")
            for place, interface in ((name, INTERFACE), (self.bts, port)):
                # frame by frame: a link would drop what the kernel hands over in one piece
                _run("ip", "-n", place, "link", "set", interface, "gso_max_segs", "1")
            self.shape(number, link, "add")

    def _network(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _address(self, name: str, address: str) -> None:
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
        _run("ip", "-n", name, "link", "set", INTERFACE, "up")


def _tc(name: str, *words: str) -> None:
    try:
        _run("tc", "-n", name, *words)
    except OSError as error:
        if "Specified qdisc kind is unknown" not in str(error):
            raise
        kind = "netem" if "netem" in words else "tbf"
        remedy = "leave --delay out" if kind == "netem" else "use a kernel with sch_tbf"
        raise ValueError(f"this kernel has no {kind}; {remedy}.") from error


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
