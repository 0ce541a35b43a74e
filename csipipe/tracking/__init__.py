"""What a run shows and writes: terminal, TensorBoard, learning curve, closing table, summary.

Rank 0 has a `Tracker`, which writes what is known of the whole run into the run's directory. Every
rank has a `RankTracker` for what it alone knows, under `ranks/`.
"""

from csipipe.tracking.events import Events
from csipipe.tracking.rank import RankTracker
from csipipe.tracking.tables import ceiling_note, exchanged_summary, test_table
from csipipe.tracking.tracker import BEGINNING, HISTORY, Tracker

__all__ = [
    "BEGINNING",
    "HISTORY",
    "Events",
    "RankTracker",
    "Tracker",
    "ceiling_note",
    "exchanged_summary",
    "test_table",
]
