"""The weights that come with the repository are what their cards say, and small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csipipe.run import trained

ZOO = Path(__file__).parents[2] / "weights"
MOST = 10_000_000  # bytes of a file


@pytest.mark.parametrize("folder", sorted(f.parent for f in ZOO.glob("*/card.json")), ids=str)
def test_weights_can_be_used_as_a_run_can(folder: Path) -> None:
    run = trained.read(folder)  # compares every file with its digest
    assert all(file.stat().st_size <= MOST for file in folder.rglob("*") if file.is_file())
    assert f"| `{folder.name}` |" in (ZOO / "README.md").read_text()
    model = run.models()[0].eval()
    rows = torch.rand(2, *run.settings.model.image)
    with torch.no_grad():
        assert model(rows).shape == rows.shape


def test_there_are_some() -> None:
    assert list(ZOO.glob("*/card.json"))
