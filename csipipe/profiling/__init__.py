"""Some iterations of a run under the microscope: traces of every rank, one view over all ranks,
and a picture of the pipeline. Imported only by a run that asks for it (`run.profile`).
"""

from csipipe.profiling.session import Profile

__all__ = ["Profile"]
