"""Seconds per iteration, split and in one process: torchrun --nproc_per_node=4 launch/benchmark.py

Takes train.py's settings; --rounds N is how often each of the two is measured, in turn.
"""

from __future__ import annotations

import sys

from csipipe import commandline

ABOUT = """Times split training (one thread per rank) beside the unsplit model in one process with
as many threads as there are cores, on the same micro-batches, in turn. Start it with torchrun."""


def main(arguments: list[str]) -> None:
    parser = commandline.parser(ABOUT)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    commandline.require_torchrun(parser, arguments, "launch/benchmark.py")

    from csipipe.bench import interleaved
    from csipipe.world import World

    world = World.from_torchrun()
    try:
        settings, options = commandline.settings(parser, arguments)
        seconds = interleaved.measure(world, settings, options.rounds)
        if seconds is not None:
            print(interleaved.table(seconds), flush=True)
    except Exception as error:
        world.fail(error, "--debug" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
