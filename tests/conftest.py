"""Tests import the helpers beside them by name, in this process and in spawned ranks.

None of them writes into the user's cache.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSIPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
