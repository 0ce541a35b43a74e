"""What runs here: versions, the card, and the flags that decide results."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from csipipe.device import processor
from csipipe.gpucheck.findings import Step

_PACKAGES = ("numpy", "triton", "deepspeed", "jsonargparse", "pydantic", "llvmlite", "tensorboard")


def run(step: Step) -> None:
    """Note them; fails where the package's own program can't be imported."""
    step.add("Python, torch", f"{platform.python_version()}, {torch.__version__}")
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    step.add("torch's CUDA, cuDNN", f"{torch.version.cuda}, {cudnn}")
    step.add("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    step.add("CPU", f"{processor()}, {len(os.sched_getaffinity(0))} cores, {_memory()}")
    if step.device.type == "cuda":
        card = torch.cuda.get_device_properties(step.device)
        step.add(
            "card",
            f"{card.name}, {card.multi_processor_count} multiprocessors, compute capability "
            f"{card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB, "
            f"L2 {card.L2_cache_size / 2**20:.0f} MiB, {torch.cuda.device_count()} of them",
        )
        step.add("nvidia-smi", _smi())
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        step.add("NCCL", ".".join(map(str, nccl)))
    step.add("gloo, NCCL in torch", f"{dist.is_gloo_available()}, {dist.is_nccl_available()}")
    step.add(
        "TF32 in cuDNN, in products; deterministic",
        f"{torch.backends.cudnn.allow_tf32}, {torch.backends.cuda.matmul.allow_tf32}, "
        f"{torch.backends.cudnn.deterministic}",
        "False, False, True",
        not torch.backends.cudnn.allow_tf32
        and not torch.backends.cuda.matmul.allow_tf32
        and torch.backends.cudnn.deterministic,
    )
    step.add("compilers", f"{_compiler('cc')}; {_compiler('nvcc')}")
    code = "import csipipe.run.training, csipipe.pipeline.engine, csipipe.run.trained"
    environment = {**os.environ, "DS_ACCELERATOR": step.device.type}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    step.add(
        "csipipe and DeepSpeed can be imported", done.returncode == 0, "True", done.returncode == 0
    )
    if done.stderr.strip():
        step.show("\n".join(done.stderr.strip().splitlines()[-15:]))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _memory() -> str:
    line = Path("/proc/meminfo").read_text().splitlines()[0]
    return f"{int(line.split()[1]) / 2**20:.0f} GiB"


def _smi() -> str:
    query = "driver_version,compute_mode,persistence_mode,power.limit,clocks.sm,clocks.mem"
    return (
        "; ".join(_said(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])) or "none"
    )


def _compiler(name: str) -> str:
    """What it says of its version: not in the same line as every other one."""
    lines = (line for line in _said([name, "--version"]) if re.search(r"\d\.\d", line))
    return next(lines, f"no {name}")


def _said(words: list[str]) -> list[str]:
    """The lines that a program prints; none where it isn't there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()
