"""Memory in bytes, as Linux counts it; None if unknown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_LIMIT = Path("/sys/fs/cgroup")


def forget_peak() -> None:
    """Reset the peak: set-up doesn't need the same memory as training."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def resident() -> int | None:
    """Memory that this process uses."""
    return _field(_PROCESS / "status", "VmRSS")


def peak() -> int | None:
    """Most memory in use since `forget_peak`."""
    return _field(_PROCESS / "status", "VmHWM")


def available() -> int | None:
    """Memory still available on this machine, within its container's limit."""
    found = _field(Path("/proc/meminfo"), "MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((_LIMIT / f"memory.{name}").read_text()) for name in ("max", "current"))
        return limit - used if found is None else min(found, limit - used)
    return found


def release() -> None:
    """Return memory to the system that training freed and `keep_memory` kept."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _field(file: Path, field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    return None
