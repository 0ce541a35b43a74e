"""What a run keeps on disk: weights for use, and snapshots to go on from.

Safetensors and JSON only. Keys are by UE, part and layer, never by rank.
"""

from csipipe.checkpoint.snapshot import (
    Record,
    Snapshot,
    commit,
    discard,
    find,
    newest,
    prune,
    sweep,
    write_part,
)
from csipipe.checkpoint.weights import flatten, load, save, switch, tail_file, ue_file, unflatten

__all__ = [
    "Record",
    "Snapshot",
    "commit",
    "discard",
    "find",
    "flatten",
    "load",
    "newest",
    "prune",
    "save",
    "sweep",
    "switch",
    "tail_file",
    "ue_file",
    "unflatten",
    "write_part",
]
