"""Compiled kernels on disk: loaded by the next process, and only if nobody else can have changed
them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from csipipe.models.kernels.llvm import machine as llvm
from csipipe.models.kernels.llvm import stages
from csipipe.models.kernels.llvm.image import Image

HERE = llvm.this_machine()
pytestmark = pytest.mark.skipif(HERE is None, reason="no vectors of this machine are known")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept, once there are some."""
    monkeypatch.setenv("CSIPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"kernels-{os.geteuid()}"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that were compiled, not loaded."""
    found: list[str] = []
    described = llvm.described

    def watched(
        machine: llvm.Machine, describe: llvm.Describe, *constants: object
    ) -> tuple[str, list[str]]:
        found.append(describe.__name__)
        return described(machine, describe, *constants)

    monkeypatch.setattr(llvm, "described", watched)
    return found


def residual(image: Image | None = None) -> torch.Tensor:
    """What a process without kernels computes with one of them."""
    assert HERE is not None
    image = image or Image(3, 5)
    torch.manual_seed(0)
    arrays = {name: torch.randn(2, 2, 3, 5) for name in ("z", "x", "out")}
    arrays["norm"] = torch.randn(6, 2)
    kernel = llvm.Kernel(HERE, stages.residual, image)
    table = np.array([2, *(arrays[name].data_ptr() for name in kernel.arrays)])
    kernel(table.ctypes.data, threads=1)
    return arrays["out"]


def test_what_was_compiled_is_loaded(folder: Path, compiled: list[str]) -> None:
    first, second = residual(), residual()
    assert compiled == ["residual"]
    assert torch.equal(first, second)
    assert folder.stat().st_mode & 0o777 == 0o700
    residual(Image(5, 3))
    assert compiled == ["residual"] * 2
    assert len(list(folder.iterdir())) == 2


def cut(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def change(folder: Path, file: Path) -> None:
    code = bytearray(file.read_bytes())
    code[-200] ^= 1
    file.write_bytes(code)


def empty(folder: Path, file: Path) -> None:
    file.write_bytes(b"")


def swap_arrays(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"z"', b'"x"'))


def open_file(folder: Path, file: Path) -> None:
    file.chmod(0o620)


def open_folder(folder: Path, file: Path) -> None:
    folder.chmod(0o777)


def link(folder: Path, file: Path) -> None:
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


def link_folder(folder: Path, file: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    "spoil", [cut, change, empty, swap_arrays, open_file, open_folder, link, link_folder]
)
def test_nothing_damaged_and_nothing_of_others_is_loaded(
    spoil: Callable[[Path, Path], None], folder: Path, compiled: list[str]
) -> None:
    first = residual()
    (file,) = folder.iterdir()
    spoil(folder, file)
    assert torch.equal(residual(), first)
    assert compiled == ["residual"] * 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_not_loaded(folder: Path, compiled: list[str]) -> None:
    residual()
    (file,) = folder.iterdir()
    os.chown(file, 12345, -1)
    residual()
    assert compiled == ["residual"] * 2


def test_a_damaged_file_is_replaced(folder: Path, compiled: list[str]) -> None:
    residual()
    (file,) = folder.iterdir()
    cut(folder, file)
    residual()
    residual()
    assert compiled == ["residual"] * 2


def test_without_a_folder_every_process_compiles(
    tmp_path: Path, folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSIPIPE_CACHE_KERNELS", "0")
    residual()
    assert not folder.exists()
    monkeypatch.delenv("CSIPIPE_CACHE_KERNELS")
    (tmp_path / "file").touch()
    monkeypatch.setenv("CSIPIPE_CACHE", str(tmp_path / "file"))
    residual()
    assert compiled == ["residual"] * 2
