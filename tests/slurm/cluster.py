"""A SLURM cluster of its own on this machine; `python tests/slurm/cluster.py COMMAND …` is in one.

As root, every node has a network namespace with an address of its own, a host name, and a mount
namespace; all of it lives in one namespace that nothing else on the machine sees. Without root
("plain"), the nodes are daemons with different ports on one address.

A keeper process starts the daemons and adopts what they leave behind. When its input closes, which
also happens if whoever started it is killed, it ends all of that, process by process.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NODES = 9
PARTITIONS = {"main": "n[1-4]", "frail": "n[5-7]", "nameless": "n[8-9]"}
"""`main`: n1 has make-believe GPUs. `nameless`: only the login node knows these by name."""
NAMED = 7
NET = "10.77.0"
CONTROLLER = f"{NET}.254"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NAMESPACES = ["unshare", "--net", "--uts", "--mount"]
CONF = """\
ClusterName=csipipe
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1
EnforcePartLimits=ALL
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
MinJobAge=3600
KillWait=5
MailProg=/bin/true
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
{nodes}
{partitions}
"""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in DAEMONS if shutil.which(name, path=path) is None]
    return (
        f"SLURM isn't installed ({', '.join(absent)} missing): "
        "apt-get install slurmctld slurmd slurm-client munge"
        if absent
        else ""
    )


def _may_separate() -> bool:
    return subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0


class Cluster:
    """A running cluster, ended on leaving.

    Args:
        plain: without namespaces, as it is anyway where they may not be made.
    """

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain or not _may_separate()
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets
        self.environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def __enter__(self) -> Cluster:
        namespaces = [] if self.plain else NAMESPACES
        self._log = open(self.folder / "keeper.log", "wb")
        self._keeper = subprocess.Popen(
            [*namespaces, sys.executable, __file__, "--keep", str(self.folder)],
            env=self.environment | {"PLAIN": "yes" if self.plain else ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        try:
            self._tell("wait")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(60)
        self._log.close()

    def command(self, *words: str) -> list[str]:
        """A command as the login node runs it."""
        inside = ["nsenter", "--net", "--uts", "--mount", f"--target={self._keeper.pid}"]
        return [*([] if self.plain else [*inside, f"--wd={os.getcwd()}"]), *words]

    def run(self, *words: str, **environment: str) -> str:
        """Output of a command on the login node.

        Raises:
            AssertionError: it failed; with what it wrote.
        """
        done = subprocess.run(
            self.command(*words),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def kill(self, node: str) -> None:
        """A node dies: every process on it, at once."""
        self._tell(f"kill {node}")

    def _tell(self, line: str) -> None:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write(line + "\n")
        self._keeper.stdin.flush()
        answer = self._keeper.stdout.readline()
        assert answer == "done\n", (self.folder / "keeper.log").read_text()


class Keeper:
    """Starts and ends everything, in a process of its own."""

    def __init__(self, folder: Path, plain: bool) -> None:
        self.folder, self.plain = folder, plain
        self._prctl = ctypes.CDLL(None).prctl
        assert self._prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: orphans become ours
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def serve(self) -> None:
        """Start, obey lines of input, and end everything when there are no more."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        assert self._prctl(1, signal.SIGTERM) == 0  # PR_SET_PDEATHSIG: also while starting
        try:
            self._start()
            for line in sys.stdin:
                word, _, node = line.strip().partition(" ")
                {"wait": self._wait, "kill": self._kill}[word](node)
                print("done", flush=True)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one more would cut this short
            _end(lambda: _family(os.getpid()))
            shutil.rmtree(self.folder)

    def _start(self) -> None:
        for name in ("state", "munge", "spool", "log"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self._configure()
        if not self.plain:
            self._network()
        place = self.folder / "munge"
        files = [f"--{name}-file={place}/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={place}/socket", *files)
        self._until(lambda: (place / "socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for number in range(1, NODES + 1):
            self._node(f"n{number}")

    def _configure(self) -> None:
        me = socket.gethostname()
        ports = [self._free_port() for _ in range(NODES + 1)]
        lines = []
        for number in range(1, NODES + 1):
            (self.folder / "spool" / f"n{number}").mkdir()
            where = (
                f"NodeHostname={me} NodeAddr=127.0.0.1 Port={ports[number]}"
                if self.plain
                else f"NodeAddr={NET}.{number}"
                if number <= NAMED
                else ""  # its name is its address
            )
            gpus = " Gres=gpu:2" if number == 1 else ""
            lines.append(f"NodeName=n{number} {where} CPUs=16 RealMemory=16000{gpus}")
        text = CONF.format(
            controller=f"{me}(127.0.0.1)" if self.plain else f"login({CONTROLLER})",
            port=ports[0] if self.plain else 6817,
            node_port=6818,
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(lines),
            partitions="\n".join(
                f"PartitionName={name} Nodes={nodes} MaxTime=1-0 DefaultTime=10 State=UP"
                + (" Default=YES" if name == "main" else "")
                for name, nodes in PARTITIONS.items()
            ),
        )
        (self.folder / "slurm.conf").write_text(text)
        # any character device does
        devices = "NodeName=n1 Name=gpu File=/dev/null\nNodeName=n1 Name=gpu File=/dev/zero\n"
        (self.folder / "gres.conf").write_text(devices)

    @staticmethod
    def _free_port() -> int:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            return int(one.getsockname()[1])

    def _network(self) -> None:
        """Inside the keeper's own namespaces: a login host with a bridge that nodes plug into."""
        lines = ["127.0.0.1 localhost", f"{CONTROLLER} login"]
        lines += [f"{NET}.{number} n{number}" for number in range(1, NODES + 1)]
        hosts = self.folder / "hosts"
        hosts.write_text("\n".join([*lines, ""]))
        known = "".join(f"{line}\n" for line in lines[: 2 + NAMED])
        (self.folder / "hosts-of-nodes").write_text(known)
        for line in (
            f"mount --bind {hosts} /etc/hosts",
            "hostname login",
            "ip link set lo up",
            "ip link add bridge0 type bridge",
            f"ip addr add {CONTROLLER}/24 dev bridge0",
            "ip link set bridge0 up",
        ):
            subprocess.run(line.split(), check=True)

    def _node(self, node: str) -> None:
        if self.plain:
            self.nodes[node] = self._daemon("slurmd", "-D", "-N", node)
            return
        mine = self.folder / "spool" / node / "private"  # a place that only this node sees
        mine.mkdir()
        shared = self.folder / "unshared"
        shared.mkdir(exist_ok=True)
        # the interface is put into the namespace as soon as that exists
        script = (
            f"hostname {node}; mount --bind {mine} {shared}; "
            f"mount --bind {self.folder}/hosts-of-nodes /etc/hosts; "
            "until ip link set eth0 up 2>/dev/null; do sleep 0.02; done; ip link set lo up; "
            f"ip addr add {NET}.{node[1:]}/24 dev eth0; exec slurmd -D -N {node}"
        )
        daemon = self._daemon("unshare", "--net", "--uts", "--mount", "sh", "-c", script)
        self.nodes[node] = daemon
        here = os.readlink("/proc/self/ns/net")
        self._until(lambda: os.readlink(f"/proc/{daemon.pid}/ns/net") != here, node)
        plug = f"ip link add to-{node} type veth peer name eth0 netns {daemon.pid}"
        subprocess.run(plug.split(), check=True)
        subprocess.run(f"ip link set to-{node} master bridge0 up".split(), check=True)

    def _kill(self, node: str) -> None:
        daemon = self.nodes.pop(node)
        if self.plain:
            _end(lambda: {daemon.pid, *_family(daemon.pid), *_tasks(node)})
        else:
            place = os.readlink(f"/proc/{daemon.pid}/ns/net")
            _end(lambda: {p for p in _family(os.getpid()) if _link(p) == place})

    def _daemon(self, *words: str) -> subprocess.Popen[bytes]:
        name = "-".join([words[0], *words[-1:]]).rpartition("/")[2][-20:]
        with open(self.folder / "log" / name, "ab") as log:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _wait(self, _: str) -> None:
        """Until every node is idle."""
        self._until(
            lambda: (
                subprocess.run(
                    ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True
                ).stdout.split()
                == [f"n{number}" for number in range(1, NODES + 1)]
            ),
            "the nodes",
        )

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(f.read_text() for f in (self.folder / "log").iterdir())
                raise TimeoutError(f"{what} did not start:\n{logs}")
            time.sleep(0.05)


def _end(alive: Callable[[], set[int]]) -> None:
    """Kill processes, by id, until none is left."""
    while found := alive():
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
        _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _family(pid: int) -> set[int]:
    """Descendants of a process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(after_name[1])
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


def _tasks(node: str) -> set[int]:
    """Processes that jobs run on a node of the plain mode, with what watches over them."""
    found = set()
    for pid in _family(os.getpid()):
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            watched = Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd")
        except (OSError, ProcessLookupError):
            continue
        if f"SLURMD_NODENAME={node}".encode() in words:
            found |= {pid, parent} if watched else {pid}
    return found


def _link(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def main(words: Sequence[str]) -> int:
    if words[:1] == ["--keep"]:
        Keeper(Path(words[1]), bool(os.environ["PLAIN"])).serve()
        return 0
    if reason := missing():
        sys.exit(reason)
    with Cluster() as cluster:
        return subprocess.run(cluster.command(*words), env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
