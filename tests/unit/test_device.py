"""What is decided for a GPU, as far as a machine without one can see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from csipipe import device
from csipipe.comm.groups import detours, greetings
from csipipe.settings.config import Settings


@pytest.fixture
def flags() -> Iterator[None]:
    """Leave torch's flags as they were."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.usefixtures("flags")
def test_fp32_is_fp32_unless_told_otherwise(tf32: bool) -> None:
    torch.backends.cudnn.benchmark = True
    device.set_arithmetic(tf32)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_only_what_goes_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def empty(*_: object, pin_memory: bool, **__: object) -> None:
        asked.append(pin_memory)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cpu", "cuda:1"):
        device.host_buffer((2, 3), torch.float32, torch.device(name))
    assert asked == [False, True]


def test_stages_greet_the_way_their_messages_go() -> None:
    assert greetings(3, backward=False) == [(0, 1), (1, 2)]
    assert greetings(3, backward=True) == [(1, 0), (2, 1)]
    assert greetings(1, backward=True) == []


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with CUDA that finds no device."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def fail(text: str) -> Callable[..., None]:
    """What raises as CUDA does."""

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    return failing


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("reason", "says"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update …",
            r"older than CUDA 13\.0.*11040.*update the driver, or install a torch",
        ),
        ("Found no NVIDIA driver on your system. Please check …", r"no NVIDIA driver.*nvidia-smi"),
    ],
)
def test_cuda_wanted_and_none_there(
    monkeypatch: pytest.MonkeyPatch, reason: str, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "init", fail(reason))
    with pytest.raises(ValueError, match=rf"train\.device is cuda, but .*{says}.*auto takes"):
        device.pick_device("cuda", 0)
    assert device.pick_device("auto", 0) == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
def test_gpus_that_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES is empty.*unset it"):
        device.pick_device("cuda", 0)


@pytest.mark.usefixtures("no_gpu")
def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="built without CUDA: install its CUDA build"):
        device.pick_device("cuda", 0)


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        (
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors …",
            r"EXCLUSIVE_PROCESS.*1 GPU\(s\).*rank 1,.*nvidia-smi -i 0 -c DEFAULT",
        ),
        ("CUDA out of memory. Tried to allocate 2.00 MiB", "no memory left for another process"),
        ("CUDA error: an unheard-of one", "can't be used: .*unheard-of.*train.device cpu"),
    ],
)
def test_a_gpu_that_refuses_a_process(
    monkeypatch: pytest.MonkeyPatch, reason: str, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "zeros", fail(reason))
    with pytest.raises(ValueError, match=rf"^cuda:0 .*{says}"):
        device.pick_device("auto", 1)


def test_a_full_gpu_says_what_to_lower() -> None:
    settings = Settings()
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"
    with (
        pytest.raises(
            OSError, match=r"^CUDA out of memory\. Tried to allocate 2\.00 GiB\. An"
        ) as e,
        device.memory_explained(settings, 4),
    ):
        raise torch.OutOfMemoryError(text)
    said = str(e.value)
    train = settings.train
    assert f"{settings.topology.ues} UEs × {train.batch_size} rows" in said
    assert f"{train.micro_batches} micro-batch(es), with 4 rank(s)" in said
    assert "Raise train.micro_batches, lower train.batch_size" in said


@pytest.mark.parametrize(
    ("stages", "name", "backend", "lines"),
    [
        (2, "cuda:0", "gloo", 1),
        (2, "cuda:0", "nccl", 0),
        (1, "cuda:0", "gloo", 0),
        (2, "cpu", "gloo", 0),
    ],
)
def test_stages_that_share_a_gpu_say_so(
    monkeypatch: pytest.MonkeyPatch, stages: int, name: str, backend: str, lines: int
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda _: backend)
    found = detours(stages, torch.device(name), object())  # type: ignore[arg-type]
    assert len(found) == lines
    assert all("through the host (gloo)" in line for line in found)


@pytest.mark.parametrize(
    ("variable", "ranks", "cores", "said"),
    [
        ("OMP_PROC_BIND=close", 3, 1, True),
        ("OMP_PLACES=cores", 3, 1, True),
        ("OMP_PROC_BIND=false", 3, 1, False),
        ("OMP_PROC_BIND=close", 1, 1, False),  # nobody else is there
        ("OMP_PROC_BIND=close", 3, 4, False),  # it had no effect
        ("OTHER=close", 3, 1, False),  # a job's share of its node
    ],
)
def test_ranks_that_openmp_pins_to_one_core_are_told(
    variable: str, ranks: int, cores: int, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    notes = device.thread_notes(ranks)
    assert bool(notes) == said
    if said:
        assert notes[0].startswith(f"{variable} makes OpenMP pin every rank")
        assert "all 3 of this node to the same 1 of 4 core(s)" in notes[0]
