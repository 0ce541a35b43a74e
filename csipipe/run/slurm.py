"""A run as a SLURM job: which node starts which ranks, from the job's environment.

`slurm/common.sh` calls `plan` on the job's first node, before anything starts: it checks for user
errors, names the run's directory and leaves the plan in it. Then every node calls `node`, which
reads the plan (so that a directory that isn't shared shows at once) and becomes a torchrun. Ranks
follow the nodes' order in the job: the BTS is on the first ones.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from csipipe.comm.topology import Topology
from csipipe.files import DAMAGED, write_file
from csipipe.run import lock
from csipipe.run.naming import title
from csipipe.settings import commandline
from csipipe.settings.config import Settings

FILE = "slurm.json"
"""The plan, in the run's directory."""
_PATIENCE = 20.0
"""Seconds after which a shared file system shows a new file on every node."""
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What every node of a job needs to know.

    Attributes:
        job: id and attempt.
        nodes: names, in the job's order.
        ranks: how many each of them starts.
        address, port: where the first node's torchrun listens.
        arguments: the settings, as `csipipe train` takes them.
    """

    job: str
    nodes: tuple[str, ...]
    ranks: tuple[int, ...]
    address: str
    port: int
    arguments: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Leave the plan in the run's directory."""
        write_file(folder / FILE, json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path, job: str, patience: float = _PATIENCE) -> Plan:
        """The plan of this attempt of the job.

        Raises:
            ValueError: it isn't there, so this node sees another directory.
        """
        deadline = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError, *DAMAGED):
                said = json.loads((folder / FILE).read_text())
                if said["job"] == job:
                    nodes, ranks, words = (tuple(said[n]) for n in ("nodes", "ranks", "arguments"))
                    return cls(job, nodes, ranks, said["address"], said["port"], words)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"run.dir: node {here()} doesn't see what the job's first node wrote into "
                    f"{folder.resolve()}; give a --run.dir on a file system that all nodes share, "
                    "or submit from a folder there."
                )
            time.sleep(0.2)

    def torchrun(self, place: int) -> list[str]:
        """The torchrun line of the node at `place`, as arguments."""
        started = [count for count in self.ranks if count]
        return [
            *("-m", "torch.distributed.run"),
            # ranks in the order of the nodes: c10d's rendezvous would number them as they arrive
            f"--nnodes={len(started)}",
            f"--node-rank={place}",
            f"--nproc-per-node={self.ranks[place]}",
            f"--master-addr={self.address}",
            f"--master-port={self.port}",
            *("-m", "csipipe", "train"),
            *self.arguments,
        ]


def job_name(environment: Environment) -> str:
    """Id and attempt of the job, the same on all its nodes."""
    return f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}"


def tasks(
    environment: Environment, expand: Callable[[str], list[str]]
) -> list[list[tuple[str, int]]]:
    """Nodes and their tasks, by component of the job; one component unless it is heterogeneous.

    Args:
        expand: names in a list of nodes as SLURM writes it.
    """
    size = int(environment.get("SLURM_HET_SIZE", "0"))
    endings = [f"_HET_GROUP_{group}" for group in range(size)] or [""]
    found = []
    for ending in endings:
        names = expand(environment[f"SLURM_JOB_NODELIST{ending}"])
        counts = task_counts(environment[f"SLURM_TASKS_PER_NODE{ending}"])
        found.append(list(zip(names, counts, strict=True)))
    return found


def task_counts(text: str) -> list[int]:
    """Tasks per node from SLURM's text, such as `3(x2),1`."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def ranks_of(settings: Settings, groups: list[list[tuple[str, int]]]) -> tuple[int, ...]:
    """Ranks that each node starts: one per task, as many as the method can use.

    Raises:
        ValueError: too few tasks, or a BTS stage outside the first component.
    """
    counts = [count for group in groups for _, count in group]
    least, most = Topology.ranks(settings, sum(counts))
    settings = settings.on(max(least, min(sum(counts), most)))
    stages = settings.stages
    if sum(counts) < least:
        together = settings.topology.placement == "together"
        needed = f"{stages} BTS rank(s)" + ("" if together else " and at least one UE rank")
        raise ValueError(
            f"{sum(counts)} task(s) are too few for topology.stages {stages}: {needed} are "
            f"needed. Submit with sbatch --ntasks={least} or more, ideally {most}, with one UE per "
            "rank."
        )
    first = sum(count for _, count in groups[0])
    if len(groups) > 1 and first < stages:
        raise ValueError(
            f"the job's first component, for the BTS, has {first} task(s), but topology.stages is "
            f"{stages}; give it --ntasks-per-node={stages} in the script."
        )
    left = most
    used = []
    for count in counts:
        used.append(min(count, left))
        left -= used[-1]
    return tuple(used)


def placement(settings: Settings, nodes: Sequence[str], ranks: Sequence[int]) -> str:
    """Which node has which roles, a line each."""
    size = sum(ranks)
    if not settings.spec.stages:
        return f"  {nodes[0]}: the unsplit model"
    topology = Topology.of(settings, size)
    ends = itertools.accumulate(ranks)
    return "\n".join(
        f"  {node}: " + (", ".join(topology.role(r) for r in range(end - n, end)) or "nothing")
        for node, n, end in zip(nodes, ranks, ends, strict=True)
    )


def folder_of(settings: Settings, environment: Environment) -> Path:
    """The run's directory, the same in every attempt of the job.

    Raises:
        ValueError: no run.dir was given, and something is there under this job's name.
    """
    if settings.run.dir is not None:
        return Path(settings.run.dir)
    name = f"{title(settings)}-job{environment['SLURM_JOB_ID']}"
    folder = Path("runs") / name
    first = environment.get("SLURM_RESTART_COUNT", "0") == "0"
    if first and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is there already, of an earlier start in this job or of another job with "
            "its number; give a --run.dir (that one, to resume its run)."
        )
    return folder


def meeting_address(nodes: Sequence[str]) -> str:
    """This node's address as the others reach it.

    Raises:
        ValueError: a node's name doesn't resolve, or not to an address that others can reach.
    """
    addresses = [address_of(node) for node in nodes[1:]]
    return address_towards(addresses[0]) if addresses else "127.0.0.1"


def address_of(node: str) -> str:
    """IPv4 address at which SLURM's own daemons reach a node, or where users aren't told that, the
    address of its name; raises as `meeting_address`.
    """
    known: dict[str, str] = {}
    with contextlib.suppress(OSError):  # PrivateData=nodes hides what SLURM knows of nodes
        words = _scontrol("show", "node", node, "--oneliner").split()
        known = dict(word.partition("=")[::2] for word in words)
    name = known.get("NodeAddr", node)
    remedy = "all nodes of a job must know each other's names, from DNS or from /etc/hosts."
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise ValueError(
            f"the name of node {name} doesn't resolve on node {here()} ({error.strerror}); {remedy}"
        ) from error
    if address.startswith("127.") and address != name:
        raise ValueError(
            f"node {name} resolves to {address}, the local host, on node {here()}; {remedy}"
        )
    return address


def address_towards(other: str) -> str:
    """This node's address on the way to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Name of the network interface that has an address of this node."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    raise ValueError(f"no network interface of {here()} has the address {address}.")


def here() -> str:
    """This node's name, as SLURM has it."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def plan(arguments: Sequence[str], environment: Environment) -> Path:
    """Check the job and prepare its run; returns the run's directory.

    Raises:
        ValueError, OSError: settings or a job that can't be used.
    """
    settings = commandline.read(arguments)
    groups = tasks(environment, _expand)
    nodes = tuple(node for group in groups for node, _ in group)
    ranks = ranks_of(settings, groups)
    folder = folder_of(settings, environment)
    lock.check(folder)  # before the plan and the wish to stop of a live run are lost
    address = meeting_address([node for node, n in zip(nodes, ranks, strict=True) if n])
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stop").unlink(missing_ok=True)  # asked of the previous attempt
        given = (*arguments, "--run.dir", str(folder))
        Plan(job_name(environment), nodes, ranks, address, port, given).write(folder)
    except OSError as error:
        raise OSError(
            f"run.dir: {folder} can't be written: {error.strerror}. Make room there if it is full, "
            "or choose another run.dir."
        ) from error
    print(describe(settings, job_name(environment), nodes, ranks, folder), file=sys.stderr)
    return folder


def describe(
    settings: Settings, job: str, nodes: Sequence[str], ranks: Sequence[int], folder: Path
) -> str:
    """The first lines of a job's output."""
    number, _, attempt = job.partition(".")
    again = f" (attempt {int(attempt) + 1})" if attempt != "0" else ""
    return "\n".join(
        [
            f"job {number}{again}: {settings.method} on {len(nodes)} node(s), {sum(ranks)} rank(s)",
            placement(settings, nodes, ranks),
            f"run:          {folder}",
            f"look at it:   tensorboard --logdir {shlex.quote(str(folder))}",
        ]
    )


def node(folder: Path, environment: Environment) -> None:
    """Become this node's torchrun; returns only where the node has no rank.

    Raises:
        ValueError: the run's directory isn't shared, or this node doesn't find the first one.
    """
    mine = Plan.read(folder, job_name(environment))
    place = int(environment["SLURM_PROCID"])
    if not mine.ranks[place]:
        return
    network = {}
    if sum(1 for count in mine.ranks if count) > 1:
        interface = interface_of(address_towards(mine.address) if place else mine.address)
        # gloo would take the address of the node's own name, which may be 127.0.1.1
        network = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    threads = {"OMP_NUM_THREADS": "1"}  # as torchrun would set it, with five lines of advice
    argv = [sys.executable, *mine.torchrun(place)]
    os.execve(sys.executable, argv, threads | network | dict(environment))


def _expand(names: str) -> list[str]:
    return _scontrol("show", "hostnames", names).split()


def _scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"scontrol {shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout


def main(words: Sequence[str]) -> None:
    """`plan ARGUMENTS …` prints the run's directory; `node DIRECTORY` becomes a torchrun."""
    try:
        if words[0] == "plan":
            print(plan(words[1:], os.environ))
        else:
            node(Path(words[1]), os.environ)
    except (OSError, ValueError) as error:
        sys.exit(f"csipipe: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
