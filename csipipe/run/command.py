"""What `csipipe train` does: one run of one method, this process being one of its ranks."""

from __future__ import annotations

import os

from csipipe.settings import commandline

ABOUT = """Trains a CSI-feedback autoencoder. Started by torchrun, the first ranks are the BTS's
pipeline stages, the others host the UEs; without torchrun, one process is all of them."""


def main(arguments: list[str]) -> int:
    """Train, as one rank of a torchrun or alone; returns the exit code."""
    parser = commandline.parser(ABOUT)
    commandline.print_if_asked(parser, arguments)

    from csipipe.comm.world import World
    from csipipe.run import training

    world = World.from_torchrun() if "RANK" in os.environ else World.alone()
    try:
        settings, _ = commandline.settings(parser, arguments)
        training.launch(world, settings)
    except Exception as error:
        world.fail(error, "--debug" in arguments)
    return 0
