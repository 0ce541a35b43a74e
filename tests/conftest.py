"""Tests import the helpers beside them by name, in this process and in spawned ranks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
