"""What `csipipe train` does: one run of one method, this process being one of its ranks."""

from __future__ import annotations

import sys

from csipipe.settings import commandline, launcher

ABOUT = """Trains a CSI-feedback autoencoder. Started by torchrun, the first ranks are the BTS's
pipeline stages, the others host the UEs; without torchrun, one process is all of them."""


def main(arguments: list[str]) -> int:
    """Train, as one rank of a torchrun or alone; returns the exit code."""
    launch = launcher.launched(arguments)
    arguments = launch.arguments
    commandline.print_if_asked(ABOUT, arguments, launch.speaks)
    if launch.leftover:
        print(f"csipipe: error: {launcher.refusal(launch.leftover)}", file=sys.stderr)
        return 1

    from csipipe.comm.world import World
    from csipipe.run import training

    try:
        world = World.launched(launch.by) if launch.by else World.alone()
    except (OSError, ValueError) as error:
        if launch.speaks_here:
            print(f"csipipe: error: {error}", file=sys.stderr)
        return 1
    try:
        settings = commandline.read(arguments)
        training.launch(world, settings)
        world.part()
    except Exception as error:
        world.fail(error, "--debug" in arguments)
    return 0
