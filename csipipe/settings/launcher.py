"""Who started this process, by what it left in the arguments and in the environment.

torchrun is recognised by a variable of its own, DeepSpeed's launcher by `--local_rank`. Rank
variables alone prove nothing: they may be left over from another program, or be another launcher's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

TORCHRUN = "TORCHELASTIC_USE_AGENT_STORE"
"""Set by torchrun on every rank, and by nobody else."""
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and DeepSpeed's launcher tell a rank."""
SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""How many processes srun or mpirun started."""
_LOCAL_RANK = re.compile(r"--local[-_]rank(=\d+)?")


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        by: who started it as one of several ranks; None: nobody.
        arguments: without the launcher's own.
        leftover: variables that look like a rank's, though no launcher is known; empty: none.
    """

    by: Literal["torchrun", "deepspeed"] | None
    arguments: list[str]
    leftover: str = ""

    @property
    def speaks(self) -> bool:
        """Whether this process prints what all of its siblings would."""
        return self.by is None or os.environ["RANK"] == "0"

    @property
    def speaks_here(self) -> bool:
        """The same among its siblings on this node."""
        return self.by is None or os.environ["LOCAL_RANK"] == "0"


def launched(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Launch:
    """How this process was started."""
    rest, local = _without_local_rank(arguments)
    complete = all(environment.get(name) for name in RANKS)
    if TORCHRUN in environment and complete:
        return Launch("torchrun", rest)
    if local and complete:
        return Launch("deepspeed", rest)
    found = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    found += [name for name in SIZES if environment.get(name, "1") not in ("", "1")]
    words = ", ".join(f"{name}={environment[name]}" for name in found)
    return Launch(None, rest, words or ("--local_rank" if local else ""))


def refusal(leftover: str) -> str:
    """What `train` says to variables that no launcher vouches for."""
    return (
        f"{leftover} says that this process is one of several ranks, but neither torchrun nor "
        "DeepSpeed's launcher started it, so it would wait for the others for ever, or train "
        "beside them. Start all ranks with torchrun --nproc_per_node=4 launch/train.py …, on a "
        "SLURM cluster with the scripts in slurm/, or one process with: env -u RANK -u WORLD_SIZE "
        "python launch/train.py …"
    )


def _without_local_rank(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--local_rank N`, and whether it was there."""
    rest: list[str] = []
    found = skip = False
    for word in arguments:
        if skip and word.isdigit():
            skip = False
        elif match := _LOCAL_RANK.fullmatch(word):
            found, skip = True, match[1] is None
        else:
            rest.append(word)
            skip = False
    return rest, found
