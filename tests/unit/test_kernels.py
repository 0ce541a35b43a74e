"""Who computes a CRBlock: kernels that show that they are right, or PyTorch's layers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from csipipe import models
from csipipe.models import kernels
from csipipe.models.crblock import CRBlock
from csipipe.models.kernels.llvm import crblock as llvm
from csipipe.models.kernels.llvm.program import Arrays
from csipipe.models.layers import Conv2d
from csipipe.settings.config import ModelSettings

PATHS = (((3, 3), (1, 3)), ((3, 1),))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been tried in this process."""
    monkeypatch.setattr(kernels, "_faults", {})


def test_the_choice_is_said() -> None:
    cpu = torch.device("cpu")
    notes = models.kernels_notes(ModelSettings(angles=4, delays=4), cpu)
    assert notes == ["CRBlocks are computed by fused kernels (llvm)"]
    plain = models.kernels_notes(ModelSettings(angles=4, delays=4, kernels_by="torch"), cpu)
    assert plain == ["CRBlocks are computed by PyTorch's layers (model.kernels_by is torch)"]
    csinet = ModelSettings(name="csinet", c1=4, angles=4, delays=4)
    assert models.kernels_notes(csinet, cpu) == [
        "small convolutions are computed by fused kernels (llvm)"
    ]
    assert not models.kernels_notes(ModelSettings(name="linear", c1=4, angles=4, delays=4), cpu)


def test_convolutions_that_somebody_else_computes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(name: str, backend: object, module: object, x: object) -> str | None:
        return "it is wrong" if isinstance(module, Conv2d) else None

    monkeypatch.setattr(kernels, "_fault", fault)
    notes = models.kernels_notes(ModelSettings(angles=4, delays=4), torch.device("cpu"))
    assert notes == [
        "CRBlocks are computed by fused kernels (llvm)",
        "small convolutions are computed by PyTorch's layers (llvm: it is wrong)",
    ]


@pytest.mark.parametrize("name", ["csinet", "crnet", "clnet"])
def test_convolutions_of_published_models_are_kernels(name: str) -> None:
    model = ModelSettings(name=name, c1=4, angles=4, delays=5)
    ends = models.build_encoder(model, 0), models.build_head(model, 0)
    for part in (*ends, *models.build_tail(model, 0)):
        for module in part.modules():
            if isinstance(module, Conv2d) and module.kernel_size != (1, 1):
                assert module.kernels_by == "auto" or _within(module, part)


def _within(module: torch.nn.Module, part: torch.nn.Module) -> bool:
    """Whether a CRBlock, which is computed whole, holds it."""
    blocks = (block for block in part.modules() if isinstance(block, CRBlock))
    return any(module is held for block in blocks for held in block.modules())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("double", "float64"),
        ("autocast", "autocast"),
        ("evaluation", "training mode only"),
        ("one value", "more than one value"),
        ("no rows", "no rows"),
        ("meta", "on meta"),
    ],
)
def test_what_kernels_cannot_do_the_layers_do(change: str, why: str) -> None:
    block, x = CRBlock(PATHS), torch.randn(4, 2, 6, 5)
    if change == "double":
        block, x = block.double(), x.double()
    elif change == "evaluation":
        block.eval()
    elif change == "one value":
        x = x[:1, :, :1, :1]
    elif change == "no rows":
        x = x[:0]
    elif change == "meta":
        block, x = block.to("meta"), x.to("meta")
    with torch.autocast("cpu", enabled=change == "autocast"):
        choice = kernels.choose(block, x)
    assert choice.backend is None
    assert why in choice.why


right = llvm.forward


def wrong(block: CRBlock, x: Tensor, training: bool) -> tuple[Tensor, Arrays]:
    y, saved = right(block, x, training)
    return y + 0.01 * (torch.arange(y.shape[-1]) == 3), saved


def broken(block: CRBlock, x: Tensor, training: bool) -> tuple[Tensor, Arrays]:
    raise RuntimeError("LLVM ERROR: Cannot select")


@pytest.mark.parametrize(
    ("forward", "why"), [(wrong, "the output differs"), (broken, "LLVM ERROR")]
)
@pytest.mark.usefixtures("untried")
def test_kernels_that_fail_their_check_give_way_with_one_line(
    forward: object,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("csipipe.models.kernels.llvm.crblock.forward", forward)
    block, x = CRBlock(PATHS), torch.randn(4, 2, 6, 5)
    with models.plain_layers():
        wanted = block(x)
    for _ in range(2):
        assert torch.equal(block(x), wanted)
    (line,) = capfd.readouterr().err.splitlines()
    assert "PyTorch's layers instead of llvm's kernels for CRBlock" in line
    assert why in line


@pytest.mark.usefixtures("untried")
def test_a_machine_that_is_not_known_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "csipipe.models.kernels.llvm.host._library_or_reason", lambda: (None, "new")
    )
    assert kernels.choose(CRBlock(PATHS), torch.randn(4, 2, 6, 5)).why == "llvm: new"


WITHOUT = """
import sys
sys.modules["llvmlite"] = None
import torch
from csipipe import models
from csipipe.settings.config import ModelSettings
model = ModelSettings(c1=8, angles=4, delays=4)
print(torch.nn.Sequential(*models.build_tail(model, 0))(torch.randn(2, 8)).shape)
print(models.kernels_notes(model, torch.device("cpu")))
"""


def test_without_llvmlite_the_layers_compute() -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT], check=True, capture_output=True, text=True, timeout=60
    )
    assert "[2, 8]" in found.stdout
    assert "PyTorch's layers (llvm can't be loaded: ModuleNotFoundError" in found.stdout
    assert not found.stderr


def test_random_numbers_stay_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    block, x = CRBlock((((3, 3),),)), torch.ones(3, 2, 3, 9)
    after_block = torch.get_rng_state()
    block(x)
    assert not torch.equal(before, after_block)
    assert torch.equal(after_block, torch.get_rng_state())
