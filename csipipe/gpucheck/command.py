"""python -m csipipe gpucheck: the steps one after the other, inside a time, onto one page."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from csipipe.gpucheck import findings, page
from csipipe.gpucheck.runs import end
from csipipe.gpucheck.steps import STEPS, Planned

ABOUT = """Runs csipipe on this machine's GPU, checks what must hold (the same numbers as the
unsplit model and as the CPU, the same bits twice, faults that are named), measures the paper's
size, and writes one Markdown page. Every step has a limit; a step that fails doesn't stop the
others, and the page is written anew after each."""
_TAIL = 3000  # characters of a failing step's output that go onto the page
_PATIENCE = 8  # times a step's limit that its rehearsal gets


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m csipipe gpucheck", description=ABOUT, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all (default 9)")
    parser.add_argument("--out", type=Path, default=Path("gpucheck"), help="folder of the page")
    parser.add_argument("--work", type=Path, help="folder of runs and logs (default OUT/work)")
    names = ",".join(step.name for step in STEPS)
    parser.add_argument("--steps", default=names, help=f"some of {names}")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal, tiny"
    )
    return parser


@dataclass
class Running:
    """A step under way or over."""

    step: Planned
    folder: Path
    limit: float
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    state: str = "running"

    def look(self) -> bool:
        """Whether it is over; ends it, with all that it started, past its limit."""
        if self.state != "running":
            return True
        self.seconds = time.monotonic() - self.began
        code = self.process.poll()
        if code is not None:
            self.state = "done" if code == 0 else f"failed with exit code {code}"
        elif self.seconds > self.limit:
            end(self.process.pid)
            self.process.wait()
            self.state = f"stopped at its limit of {self.limit:.0f} s"
        return self.state != "running"

    def found(self) -> dict[str, Any]:
        """As `page.page` wants it."""
        log = self.folder / "error.txt"
        failed = self.state not in ("done", "running")
        error = log.read_text(errors="replace")[-_TAIL:] if failed and log.is_file() else ""
        return {
            "name": self.step.name,
            "about": self.step.about,
            "state": self.state,
            "seconds": self.seconds or time.monotonic() - self.began,
            "error": error,
            **findings.read(self.folder),
        }


def main(arguments: list[str]) -> int:
    """Run the command; 1 if a check or a step failed, 2 without a GPU."""
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "csipipe: error: this machine offers torch no CUDA device, so there is nothing to "
            "check; see nvidia-smi, and torch.version.cuda against the driver.",
            file=sys.stderr,
        )
        return 2
    wanted = options.steps.split(",")
    if unknown := set(wanted) - {step.name for step in STEPS}:
        print(f"csipipe: error: --steps names {', '.join(unknown)}; see --help.", file=sys.stderr)
        return 2
    work = options.work or options.out / "work"
    check = Check(options.out, work, options.device, 60 * options.minutes)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        for step in STEPS:
            if step.name in wanted:
                check.start(step)
        check.wait()
    finally:
        check.stop()
        print(check.page)
    return int(any(r.state != "done" for r in check.running) or not check.all_hold)


class Check:
    """All steps of one call.

    Args:
        out: folder of the page; made if it isn't there.
        work: where steps may write.
        seconds: for all steps.
    """

    def __init__(self, out: Path, work: Path, device: str, seconds: float) -> None:
        self.out = out
        self.page = out / "page.md"
        self.device = device
        self.deadline = time.monotonic() + seconds
        self.running: list[Running] = []
        self.left_out: list[str] = []
        self.work = work.resolve()
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)

    def start(self, step: Planned) -> None:
        """Start a step; one that needs the device alone once all others are over."""
        others = self.running and self.running[-1].step.alone
        if step.alone or others or self.device == "cpu":
            self.wait()
        left = self.deadline - time.monotonic()
        if left < 10:
            self.left_out.append(step.about)
            return
        folder = self.work / step.name
        folder.mkdir(exist_ok=True)
        limit = min(step.limit * (_PATIENCE if self.device == "cpu" else 1), left)
        line = [sys.executable, "-m", "csipipe.gpucheck.steps", step.name, self.device, str(folder)]
        with open(folder / "log.txt", "wb") as log, open(folder / "error.txt", "wb") as error:
            process = subprocess.Popen(
                [*line, str(limit)], stdout=log, stderr=error, stdin=subprocess.DEVNULL
            )
        self.running.append(Running(step, folder, limit, process))
        self.write()

    def wait(self) -> None:
        """Wait until all steps that were started are over."""
        over = 0
        while over < len(self.running):
            time.sleep(0.2)
            now = sum(running.look() for running in self.running)
            if now > over:
                self.write()
            over = now

    def stop(self) -> None:
        """End what still runs, as the command does; the page says so."""
        for running in self.running:
            if not running.look():
                end(running.process.pid)
                running.process.wait()
                running.state = "stopped with the command"
        self.write()

    @property
    def all_hold(self) -> bool:
        """Whether no check failed."""
        steps = [running.found() for running in self.running]
        return all(row["ok"] is not False for step in steps for row in step["rows"])

    def write(self) -> None:
        """Write found.json and page.md anew."""
        steps = [running.found() for running in self.running]
        (self.out / "found.json").write_text(json.dumps(steps, indent=1))
        empty = {"state": "not run", "seconds": 0.0, "rows": [], "texts": [], "error": ""}
        steps += [{"about": f"{about}: no time was left", **empty} for about in self.left_out]
        for kept in self.work.glob(f"*/{findings.KEPT}/*"):
            shutil.copy(kept, self.out)
        title = "csipipe on a GPU" if self.device == "cuda" else "Rehearsal on a CPU: no figures"
        self.page.write_text(page.page(title, steps))
