"""What a run keeps on disk: weights to use, and snapshots to resume from.

Safetensors and JSON only. Keys are by UE, part and layer, never by rank.
"""

from csipipe.checkpoint.snapshot import (
    MANIFEST,
    Record,
    Snapshot,
    commit,
    discard,
    find,
    newest,
    prune,
    rewind,
    sweep,
    write_part,
)
from csipipe.checkpoint.weights import (
    fill,
    flatten,
    halved,
    read,
    save,
    switch,
    switched,
    tail_file,
    ue_file,
    unflatten,
    write,
)

__all__ = [
    "MANIFEST",
    "Record",
    "Snapshot",
    "commit",
    "discard",
    "fill",
    "find",
    "flatten",
    "halved",
    "newest",
    "prune",
    "read",
    "rewind",
    "save",
    "sweep",
    "switch",
    "switched",
    "tail_file",
    "ue_file",
    "unflatten",
    "write",
    "write_part",
]
