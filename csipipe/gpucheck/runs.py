"""Runs of the program under torchrun, as a user starts them, and what they left; the unsplit model
that they are compared with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from csipipe import channels, checkpoint, methods
from csipipe.gpucheck.findings import Step
from csipipe.methods.centralised import Centralised
from csipipe.settings import commandline
from csipipe.settings.config import Settings

_ROOT = Path(__file__).parents[2]
_TRAIN = ("-m", "csipipe", "train")
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
_HOW = re.compile("are computed|kernels for|CUDA graph")
"""What a run says of how it computes."""


def settings(folder: Path, arguments: dict[str, Any]) -> Settings:
    """What a run with those arguments has, on channels of known size."""
    return channels.sized(commandline.read(line(folder, arguments)))


def private(step: Step, arguments: dict[str, Any]) -> Centralised:
    """The unsplit model of such a run on the step's device, an encoder and a head for each UE."""
    made = settings(step.folder / "unsplit", arguments)
    ues, test = methods.load(made, range(made.topology.ues), step.device)
    return Centralised(made, ues, test, step.device, shared=False)


def line(folder: Path, arguments: dict[str, Any]) -> list[str]:
    """Arguments of the program."""
    pairs = {"run.dir": folder, **arguments}
    return [part for name, value in pairs.items() for part in (f"--{name}", str(value))]


def start(step: Step, name: str, ranks: int, arguments: dict[str, Any], *script: str) -> Run:
    """A run in the step's folder; a rehearsal has no cores for several at once and waits for it."""
    run = Run(step.folder / name, ranks, arguments, script or _TRAIN)
    if step.tiny:
        run.wait(step.left - 2)
    return run


@dataclass
class Run:
    """One run under way; starts at once.

    Args:
        folder: the run's directory.
        ranks: processes.
        script: what each rank runs: `-m` and a module.
    """

    folder: Path
    ranks: int
    arguments: dict[str, Any]
    script: tuple[str, ...] = _TRAIN

    def __post_init__(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.folder.with_suffix(".log")
        start = [*_TORCHRUN, "--standalone", "--local-addr=127.0.0.1"]
        start += [f"--nproc_per_node={self.ranks}", *self.script]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        self.began = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*start, *line(self.folder, self.arguments)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )

    def wait(self, seconds: float) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it isn't over in that time.
        """
        try:
            return self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self.folder.name} isn't over:\n{self.tail()}") from error

    def succeed(self, seconds: float) -> Run:
        """Wait, and be sure (RuntimeError) that it finished."""
        code = self.wait(seconds)
        if code:
            raise RuntimeError(f"{self.folder.name} ended with {code}:\n{self.tail()}")
        return self

    def tail(self, characters: int = 2500) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-characters:]

    def errors(self) -> list[str]:
        """What csipipe itself said was wrong."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [text for text in lines if text.startswith("csipipe: error:")]

    def how(self) -> list[str]:
        """What it said of how it computes."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [text for text in lines if _HOW.search(text)]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    @property
    def losses(self) -> Tensor:
        """(evaluations, UEs) losses on the test set."""
        lines = (self.folder / "history.jsonl").read_text().splitlines()
        tests = [json.loads(text)["test"] for text in lines]
        return torch.tensor(
            [[ue["loss"] for ue in test["per_ue"]] for test in tests], dtype=torch.float64
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """All weights at the end, by file and name."""
        return {
            f"{file.stem} {name}": tensor
            for file in sorted((self.folder / "weights").glob("*.safetensors"))
            for name, tensor in checkpoint.read(file).items()
        }


def end(pid: int) -> None:
    """Kill a process and all its descendants (torchrun's ranks have sessions of their own)."""
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """Empty if all tensors are the same; else how many aren't, and the largest difference."""
    if one.keys() != other.keys():
        return f"other tensors: {sorted(one.keys() ^ other.keys())[:3]}"
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    if not differ:
        return ""
    worst = max(float((one[name].double() - other[name].double()).abs().max()) for name in differ)
    return f"{len(differ)} of {len(one)} tensors differ, by {worst:.1e} at most"


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest relative difference; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(((found - wanted).abs() / wanted.abs()).max())
