"""Everything that depends on the device: which one, threads, precision, host staging."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from csipipe.settings.config import Precision, Settings

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """Device of this rank: `auto`, `cpu` or `cuda`; ranks of one node share its GPUs in turn.

    Raises:
        ValueError: `cuda` where there is none, or the GPU refuses this process.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device is cuda, but {_without_cuda()}; auto takes the CPU.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    try:
        torch.zeros(1, device=device)  # creates the GPU's context here, not at the first layer
    except RuntimeError as error:
        raise ValueError(_refused(device, local_rank, str(error).splitlines()[0])) from error
    # autograd's threads start without one, and torch warns about it in every run
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA")
    return device


def _without_cuda() -> str:
    """Why torch finds no CUDA device, and what to do about it."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install its CUDA build, from pytorch.org"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs: unset it"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if "driver" in reason and "too old" in reason:
            return (
                f"the driver is older than CUDA {torch.version.cuda}, which this torch is built "
                f"for ({reason}): update the driver, or install a torch built for an older CUDA"
            )
        return f"torch can't use one ({reason}): see nvidia-smi"
    return "this machine has no CUDA device: see nvidia-smi"


def _refused(device: torch.device, local_rank: int, reason: str) -> str:
    """Why a GPU doesn't take this process; ranks beyond the number of GPUs share one."""
    if "busy or unavailable" in reason:
        return (
            f"{device} takes no further process ({reason}): with compute mode EXCLUSIVE_PROCESS, "
            f"which `nvidia-smi -q -d COMPUTE` shows, a GPU takes one. This node has "
            f"{torch.cuda.device_count()} GPU(s), and this is its rank {local_rank}, counted from "
            f"0: start as many ranks as GPUs, or `nvidia-smi -i {device.index} -c DEFAULT`."
        )
    if "out of memory" in reason:
        return (
            f"{device} has no memory left for another process ({reason}): see nvidia-smi for who "
            "has it; start fewer ranks on this GPU, or use train.device cpu."
        )
    return f"{device} can't be used: {reason}; see nvidia-smi, or use train.device cpu."


@contextlib.contextmanager
def memory_explained(settings: Settings, ranks_on_node: int) -> Iterator[None]:
    """Name what needs a GPU's memory, and what to lower, if there isn't enough (OSError)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        train, ues = settings.train, settings.participants
        reason = str(error).split(". GPU", 1)[0]
        raise OSError(
            f"{reason}. An iteration takes {ues} UEs × {train.batch_size} rows in "
            f"{train.micro_batches} micro-batch(es), with {ranks_on_node} rank(s) on this node's "
            f"{torch.cuda.device_count()} GPU(s). Raise train.micro_batches, lower "
            "train.batch_size or the number of ranks, use train.precision bf16, or (a CUDA graph "
            "keeps the memory of an iteration) train.cuda_graph never."
        ) from error


_PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables that make OpenMP choose cores for its threads."""


def set_threads(wanted: int | None, ranks_on_node: int) -> int:
    """Set this rank's CPU threads and return their number.

    torchrun exports OMP_NUM_THREADS=1 when the user set nothing, so its 1 means nothing; any other
    number is the user's. More threads than cores would ruin every timing.
    """
    if wanted is None:
        exported = os.environ.get("OMP_NUM_THREADS", "")
        least = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1
        cores = len(os.sched_getaffinity(0))
        wanted = (
            int(exported)
            if exported.isdigit() and int(exported) >= least
            else max(1, cores // ranks_on_node)
        )
    torch.set_num_threads(wanted)
    return wanted


def thread_notes(ranks_on_node: int) -> list[str]:
    """A note for the user if OpenMP was told to pin threads, which it does rank by rank."""
    told = [name for name in _PINNING if os.environ.get(name, "false").lower() != "false"]
    here, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if not told or ranks_on_node == 1 or here == cores:
        return []
    words = " ".join(f"{name}={os.environ[name]}" for name in told)
    return [
        f"{words} makes OpenMP pin every rank for itself, and all {ranks_on_node} of this node to "
        f"the same {here} of {cores} core(s). Unset it: ranks are faster where the system places "
        "them."
    ]


def set_arithmetic(tf32: bool) -> None:
    """Let a GPU compute fp32 as fp32, and the same bits every time.

    By default cuDNN uses TF32, which keeps 10 bits of a factor's mantissa, and may add up weight
    gradients in the order in which its blocks happen to end.

    Args:
        tf32: let fp32 convolutions and products use TF32 nevertheless.
    """
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # the fastest kernel may be another one next time


def keep_memory() -> None:
    """Let the allocator keep freed memory: each iteration needs the same memory as the last one.

    glibc returns large blocks to the system and faults them in, zeroed, at every use, which costs
    a CPU rank a tenth of its time. Does nothing on other C libraries.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    # glibc before 2.35 accepts no more than 32 MiB; set this before the trim threshold, since
    # setting either of them ends glibc's own adjustment of both
    if any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in (2**30, 2**25)):
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def computes_in(precision: Precision, device: torch.device) -> Precision:
    """Arithmetic of a precision on a device: fp32 on a CPU.

    On one without instructions for bf16 (Zen 3, one thread, in turn), autocast took 5.9 times as
    long as the same layers in fp32, and 14 times as long as the fused kernels, which are fp32.
    CPUs that have them weren't measured.
    """
    return "fp32" if device.type == "cpu" else precision


def stage_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Type of what crosses between stages: that of the arithmetic, rounded nowhere else."""
    return torch.bfloat16 if computes_in(precision, device) == "bf16" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Arithmetic of the UE parts and the unsplit model; DeepSpeed does the same for the tail."""
    coarse = computes_in(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=coarse)


def computable(x: Tensor) -> Tensor:
    """What was received, in a type in which its device computes."""
    return x.float() if x.device.type == "cpu" else x


def precision_notes(precision: Precision, device: torch.device) -> list[str]:
    """What a run reports about its precision, if that is unexpected."""
    if computes_in(precision, device) == precision:
        return []
    return [
        f"train.precision is {precision}: on a CPU that is what is sent between UEs and BTS; "
        "arithmetic is float32"
    ]


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host tensor for transfers to and from `device`: pinned where that is a GPU.

    Nowhere else: pinning opens a context of half a gigabyte on a GPU that a CPU rank never uses.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def upload(host: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """A copy of `host` on `device`, and a function that waits until `host` may be overwritten."""
    return host.to(device, non_blocking=True, copy=True), _mark(device)


def download(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the host, and a function that waits until it is complete."""
    host = host_buffer(tuple(tensor.shape), tensor.dtype, tensor.device)
    return host.copy_(tensor, non_blocking=True), _mark(tensor.device)


def _mark(device: torch.device) -> Callable[[], None]:
    """A function that waits until `device` has done all work given to it so far."""
    if device.type == "cpu":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all its work, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
