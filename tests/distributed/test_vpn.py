"""The VPN of docs/security.md, tried: two machines' networks, WireGuard between them, a capture of
the cable.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_run import ROOT, arguments

MISSING = [tool for tool in ("ip", "wg", "wireguard-go") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(
        bool(MISSING), reason=f"{', '.join(MISSING)} missing: apt-get install wireguard-go"
    ),
]
PORT = 51820

# every packet of an interface, as protocol and ports; a packet's bytes are counted, not kept
CAPTURE = """
import collections, json, pathlib, signal, socket, struct, sys
seen = collections.Counter()
def end(*_):
    pathlib.Path(sys.argv[2]).write_text(json.dumps(seen))
    sys.exit()
signal.signal(signal.SIGTERM, end)
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as cable:
    cable.bind((sys.argv[1], 0))
    print("ready", flush=True)
    while True:
        packet = cable.recv(65536)
        kind, = struct.unpack("!H", packet[12:14])
        name = {0x0806: "ARP", 0x86DD: "IPv6"}.get(kind, hex(kind))
        if kind == 0x0800:
            start = 14 + 4 * (packet[14] & 15)
            ports = struct.unpack("!HH", packet[start : start + 4])
            name = f"IPv4 {packet[23]} {ports[0]} {ports[1]}"
        seen[name] += len(packet)
"""


class Place:
    """A machine's network: a namespace with a cable and a WireGuard interface."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name = f"csipipe-{os.getpid()}-{number}"
        self.wg = f"wg{number}"
        self.cable = f"c{os.getpid()}-{number}"
        self.key = folder / self.name
        self.key.touch(mode=0o600)
        self.key.write_text(run("wg", "genkey"))

    def __enter__(self) -> Place:
        run("ip", "netns", "add", self.name)
        self.inside("ip", "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        # WireGuard's process ends with its interface
        subprocess.run(["ip", "-n", self.name, "link", "del", self.wg], capture_output=True)
        run("ip", "netns", "del", self.name)

    def inside(self, *words: str, given: str = "") -> str:
        return run("ip", "netns", "exec", self.name, *words, given=given)

    def connect(self, number: int, other: Place, its: int) -> None:
        """Put the cable's end into use, and WireGuard on top."""
        public = run("wg", "pubkey", given=other.key.read_text())
        self.inside("ip", "addr", "add", f"192.168.77.{number}/24", "dev", self.cable)
        self.inside("ip", "link", "set", self.cable, "up")
        self.inside("wireguard-go", self.wg)
        mine = ("private-key", str(self.key), "listen-port", str(PORT))
        theirs = ("endpoint", f"192.168.77.{its}:{PORT}", "allowed-ips", f"10.0.0.{its}/32")
        self.inside("wg", "set", self.wg, *mine, "peer", public.strip(), *theirs)
        self.inside("ip", "addr", "add", f"10.0.0.{number}/24", "dev", self.wg)
        self.inside("ip", "link", "set", self.wg, "up")


def run(*words: str, given: str = "") -> str:
    done = subprocess.run(
        words, input=given, capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Place]]:
    with ExitStack() as stack:
        found = [stack.enter_context(Place(number, tmp_path)) for number in range(2)]
        a, b = found
        run(
            *("ip", "link", "add", a.cable, "netns", a.name, "type", "veth"),
            *("peer", "name", b.cable, "netns", b.name),
        )
        a.connect(1, b, 2)
        b.connect(2, a, 1)
        yield found


def line_of_the_docs(number: int, place: Place) -> list[str]:
    """The documented command of a node, with two ranks."""
    text = (ROOT / "docs" / "security.md").read_text()
    [line] = re.findall(r"^GLOO_SOCKET_IFNAME=.*torchrun .*$", text, re.MULTILINE)
    for before, after in (
        ("wg0", place.wg),
        ("--node-rank=0", f"--node-rank={number}"),
        ("--nproc-per-node=4", "--nproc-per-node=2"),
        (" torchrun ", f" {sys.executable} -m torch.distributed.run "),
        (" --run.dir DIR", ""),
    ):
        assert before in line
        line = line.replace(before, after)
    return ["ip", "netns", "exec", place.name, "env", *shlex.split(line)]


def test_the_documented_vpn_carries_all_that_leaves_a_node(
    places: list[Place], tmp_path: Path
) -> None:
    a = places[0]
    words = [sys.executable, "-c", CAPTURE, a.cable, str(tmp_path / "seen")]
    capture = subprocess.Popen(
        ["ip", "netns", "exec", a.name, *words], stdout=subprocess.PIPE, text=True
    )
    nodes: list[subprocess.Popen[str]] = []
    try:
        assert capture.stdout is not None
        assert capture.stdout.readline() == "ready\n"
        for number, place in enumerate(places):
            line = [*line_of_the_docs(number, place), *arguments(tmp_path / "run")]
            pipe = subprocess.PIPE
            nodes.append(subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        said = [node.communicate(timeout=300) for node in nodes]
    finally:
        for process in nodes:
            process.kill()
        capture.terminate()
        capture.wait(timeout=20)
    assert [node.returncode for node in nodes] == [0, 0], said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    seen = json.loads((tmp_path / "seen").read_text())
    print(seen)
    tunnel = seen.pop(f"IPv4 17 {PORT} {PORT}")
    assert set(seen) <= {"ARP", "IPv6"}  # neighbours that are looked for
    assert sum(seen.values()) < 10_000
    assert tunnel > sum(summary["exchanged"]["bytes"].values()) / 2
