"""One run of one method: torchrun --nproc_per_node=4 launch/train.py [--section.key value …]"""

from __future__ import annotations

import sys

from csipipe.settings import commandline

ABOUT = """Trains a CSI-feedback autoencoder. Start it with torchrun: the first ranks are the BTS's
pipeline stages, the others host the UEs."""


def main(arguments: list[str]) -> None:
    parser = commandline.parser(ABOUT)
    commandline.require_torchrun(parser, arguments, "launch/train.py")

    from csipipe.comm.world import World
    from csipipe.run import training

    world = World.from_torchrun()
    try:
        settings, _ = commandline.settings(parser, arguments)
        training.launch(world, settings)
    except Exception as error:
        world.fail(error, "--debug" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
