"""Figures of a run's weights: python launch/evaluate.py RUN [--compare RUN …] [--data.… …]"""

from __future__ import annotations

import os
import sys

from csipipe.settings import commandline

ABOUT = """Evaluates the weights of the run in directory RUN: the paper's loss, centred NMSE, ρ and
SGCS, per UE, mean and over samples. A run in progress, or an interrupted one, is evaluated from its
newest checkpoint. One process is enough; under torchrun the ranks share the rows."""


def main(arguments: list[str]) -> None:
    rank = os.environ.get("RANK")
    if {"-h", "--help"} & set(arguments) and rank not in (None, "0"):
        sys.exit(0)

    from csipipe.comm.world import World
    from csipipe.evaluation import command

    parser = commandline.RunParser("launch/evaluate.py", ABOUT)
    command.add_arguments(parser)
    world = None if rank is None else World.from_torchrun()
    try:
        options, settings = parser.parse(arguments)
        command.run(options, settings, world)
    except Exception as error:
        if world is not None:
            world.fail(error, "--debug" in arguments)
        if "--debug" in arguments or not isinstance(error, ValueError | OSError):
            raise
        sys.exit(f"csipipe: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
