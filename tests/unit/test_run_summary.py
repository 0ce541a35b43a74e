"""What the end of a run says, whatever has become of its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from runs import small
from torch.distributed import FileStore  # type: ignore[attr-defined]

from csipipe.comm.world import World
from csipipe.run import summary


@pytest.mark.parametrize("there", [True, False])
def test_a_run_whose_data_is_gone_is_finished_all_the_same(there: bool, tmp_path: Path) -> None:
    settings = small(topology={"stages": 1}, data={"train_samples": 400}).on(1)
    if not there:
        data = replace(settings.data, source="csinet", path=str(tmp_path / "gone"))
        settings = replace(settings, data=data)
    world = World(FileStore(str(tmp_path / "store"), 1), 0, 1, 0, 1)
    found = summary.pca(settings, world)
    assert (found is not None) == there
