"""Runs that are resumed, spoiled or killed."""

from __future__ import annotations

import time

import psutil
import torch

from csipipe.gpucheck.findings import Step
from csipipe.gpucheck.parity import small
from csipipe.gpucheck.runs import Run, end, relative, same_bits, start

_HALF = 6


def resume(step: Step) -> None:
    """Twelve iterations in one go, and the last six of them again from the checkpoint between.

    In one process, which replays them on a GPU; the last six on two ranks, too, which don't.
    """
    arguments = small(step) | {
        "topology.stages": 1,
        "train.iterations": 2 * _HALF,
        "run.save_every": _HALF,
        "run.eval_every": 2,
    }
    whole = Run(step.folder / "whole", 1, arguments).succeed(step.left - 2)
    again = arguments | {"run.resume": whole.folder / "checkpoints" / str(_HALF)}
    device = step.device.type
    same = {ranks: start(step, f"again-{ranks}", ranks, again) for ranks in (1, 2)}
    cpu = start(step, "cpu", 2, again | {"train.device": "cpu"})
    for ranks, run in same.items():
        run.succeed(step.left - 2)
        differ = same_bits(whole.weights, run.weights)
        name = f"{device} → {device}, {ranks} rank(s)"
        step.add(name, differ or "the same bits", "the same bits", not differ)
    cpu.succeed(step.left - 2)
    found = relative(cpu.losses[-3:], whole.losses[-3:])
    step.add(f"{device} → cpu, losses", f"{found:.1e}", "≤ 1e-03", found <= 1e-3)


def faults(step: Step) -> None:
    """A NaN from a UE, which stops the run or is dropped, and a rank that is killed."""
    before = _used(step)
    spoil = ("-m", "csipipe.gpucheck.spoil")
    # evaluated at the end only: the third message of a kind is then the third iteration's
    arguments = small(step) | {"topology.stages": 1, "run.timeout": 20, "run.eval_every": 1000}
    stop = start(step, "nan-stop", 3, arguments, *spoil)
    drop = start(step, "nan-drop", 3, arguments | {"train.on_bad_ue": "drop"}, *spoil)
    long = ("train.iterations", "run.eval_every", "run.save_every")
    killed = Run(step.folder / "killed", 3, arguments | dict.fromkeys(long, 1_000_000))
    try:
        _kill_one(step, killed)
    finally:
        if killed.process.poll() is None:  # it would go on for ever
            end(killed.process.pid)
    code, said = _ended(step, stop)
    good = code != 0 and "UE 0" in said
    step.add("NaN, stop", f"exit {code}: {said}", "an error that names UE 0", good)
    code, said = _ended(step, drop)
    out = drop.summary["dropped"] if code == 0 else said
    good = out == [1, 0, 0, 0]
    step.add("NaN, drop", f"exit {code}, left out: {out}", "UE 0 left out once", good)
    if step.device.type == "cuda":
        time.sleep(1)
        after = _used(step)
        # the other steps beside this one come and go: only the card alone would say it exactly
        step.add(
            "memory of the card in use before and after (other steps run)",
            f"{before / 2**20:.0f} and {after / 2**20:.0f} MiB",
        )


def _kill_one(step: Step, run: Run) -> None:
    """Kill UE rank 2 once training goes on, and see who is named how soon."""
    deadline = time.monotonic() + min(60.0, step.left - 25)
    while not (ranks := _training(run)):
        if time.monotonic() > deadline or run.process.poll() is not None:
            raise RuntimeError(f"no training to spoil:\n{run.tail()}")
        time.sleep(0.2)
    time.sleep(3)
    ranks["2"].kill()
    at = time.monotonic()
    code, said = _ended(step, run)
    seconds = time.monotonic() - at
    good = code != 0 and "UE rank 2" in said
    step.add("a killed rank", f"after {seconds:.1f} s: {said}", "names UE rank 2", good)
    alive = [rank for rank in ranks.values() if rank.is_running()]
    step.add("its fellows", f"{len(alive)} of {len(ranks)} still there", "none", not alive)


def _ended(step: Step, run: Run) -> tuple[int, str]:
    """A run's exit code, and its errors."""
    code = run.wait(step.left - 2)
    return code, " / ".join(dict.fromkeys(run.errors())) or "no error"


def _training(run: Run) -> dict[str, psutil.Process]:
    """The ranks' processes by rank, once the run has its directory."""
    if not (run.folder / "config.yaml").exists():
        return {}
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(run.process.pid).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None:
            found.setdefault(rank, process)
    return found if len(found) == run.ranks else {}


def _used(step: Step) -> int:
    if step.device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(step.device)
    return total - free
