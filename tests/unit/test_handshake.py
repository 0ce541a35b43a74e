"""What nodes compare before they train: no processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from csipipe.run.handshake import compare_settings
from csipipe.settings.config import Settings, TrainSettings


@dataclass
class Node:
    """As much of a `World` as the comparison uses; both ranks in one process."""

    rank: int = 0
    texts: dict[str, str] = field(default_factory=dict)

    def shared(self, name: str, mine: str) -> str:
        return self.texts.setdefault(name, mine)


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
    with pytest.raises(ValueError, match=r"rank 1 was started with .*'stage': 1.*'stage': 0"):
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
