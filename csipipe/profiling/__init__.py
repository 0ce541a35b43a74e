"""Some iterations of a run in detail: traces of every rank, one view of all ranks, and a picture
of the pipeline. Imported only by a run that asks for it (`run.profile`).
"""

from csipipe.profiling.session import Profile

__all__ = ["Profile"]
