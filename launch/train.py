"""One run of one method: torchrun --nproc_per_node=4 launch/train.py [--section.key value …]"""

from __future__ import annotations

import os
import sys

from csipipe import commandline

ABOUT = """Trains a CSI-feedback autoencoder. Start it with torchrun: the first ranks are the BTS's
pipeline stages, the others host the UEs."""


def main(arguments: list[str]) -> None:
    parser = commandline.parser(ABOUT)
    if "RANK" not in os.environ:
        commandline.settings(parser, arguments)  # so that --help and mistakes don't need torchrun
        sys.exit(
            "csipipe: a run has several processes; start it with\n"
            f"  torchrun --nproc_per_node=4 launch/train.py {' '.join(arguments)}".rstrip()
        )
    if os.environ["RANK"] != "0" and {"-h", "--help"} & set(arguments):
        return

    from csipipe import training
    from csipipe.world import World

    world = World.from_torchrun()
    debug = "--debug" in arguments
    try:
        settings, debug = commandline.settings(parser, arguments)
        training.launch(world, settings)
    except Exception as error:
        world.fail(error, debug)


if __name__ == "__main__":
    main(sys.argv[1:])
