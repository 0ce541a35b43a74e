"""What nodes compare before they train: no processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from csipipe.run.handshake import agree_on_images, compare_settings
from csipipe.settings.config import (
    DataSettings,
    ModelSettings,
    Settings,
    TopologySettings,
    TrainSettings,
)


@dataclass
class Node:
    """As much of a `World` as the comparison uses; both ranks in one process."""

    rank: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    size: int = 2

    def shared(self, name: str, mine: str, origin: int = 0) -> str:
        if self.rank == origin:
            self.texts[name] = mine
        return self.texts[name]


def compare(mine: Settings, there: Settings) -> None:
    """Rank 1 of `mine` meets rank 0 of `there`."""
    nodes: Any = Node(), Node(1)
    compare_settings(nodes[0], there)
    nodes[1].texts = nodes[0].texts
    compare_settings(nodes[1], mine)


def with_file(file: Path, **zero: Any) -> Settings:
    """Settings with a DeepSpeed file."""
    file.write_text(json.dumps({"gradient_clipping": 0.0, "zero_optimization": zero}))
    return Settings(train=TrainSettings(deepspeed=str(file)))


def test_deepspeed_files_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    one = with_file(tmp_path / "one.json", stage=1)
    compare(one, with_file(tmp_path / "two.json", stage=1))
    with pytest.raises(ValueError, match=r'rank 1 was started with .*"stage": 1.*"stage": 0'):
        compare(one, with_file(tmp_path / "two.json", stage=0))


def test_other_settings_are_compared_too() -> None:
    with pytest.raises(ValueError, match=r"started with train.lr 0\.5, rank 0 with 0\.002"):
        compare(Settings(train=TrainSettings(lr=0.5)), Settings())


def test_one_path_may_hold_two_files(tmp_path: Path) -> None:
    nodes: Any = Node(), Node(1)
    file = tmp_path / "file.json"
    compare_settings(nodes[0], with_file(file, stage=0))
    nodes[1].texts = nodes[0].texts
    with pytest.raises(ValueError, match="the same DeepSpeed file"):
        compare_settings(nodes[1], with_file(file, stage=1))


def test_the_host_of_ue_0_says_how_large_the_images_are(tmp_path: Path) -> None:
    """The BTS's rank 0 may have no data: here its folder is elsewhere."""
    host: Any = Node(1)
    model, place = ModelSettings(delays=8), TopologySettings(stages=1)
    data = DataSettings(source="csinet", path=str(tmp_path))
    agreed = agree_on_images(host, Settings(data=data, model=model, topology=place))
    assert (agreed.model.angles, agreed.model.delays, agreed.data.kind) == (32, 8, "channel")
    stage: Any = Node(0, host.texts)
    nowhere = DataSettings(source="csinet", path=str(tmp_path / "nowhere"))
    theirs = agree_on_images(stage, Settings(data=nowhere, model=model, topology=place))
    assert theirs.model == agreed.model
    with pytest.raises(FileNotFoundError, match="nowhere"):
        agree_on_images(host, Settings(data=nowhere, topology=place))


def test_what_is_larger_than_the_data_is_refused_before_ranks_wait(tmp_path: Path) -> None:
    host: Any = Node(1)
    data = DataSettings(source="csinet", path=str(tmp_path))
    model, place = ModelSettings(angles=64), TopologySettings(stages=1)
    settings = Settings(data=data, model=model, topology=place)
    with pytest.raises(ValueError, match=r"model.angles is 64; CsiNet's files hold 32"):
        agree_on_images(host, settings)
