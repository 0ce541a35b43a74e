"""What `csipipe train` does: one run of one method, this process being one of its ranks."""

from __future__ import annotations

from csipipe.settings import commandline

ABOUT = """Trains a CSI-feedback autoencoder. Start it with torchrun: the first ranks are the BTS's
pipeline stages, the others host the UEs."""


def main(arguments: list[str]) -> int:
    """Train, as one rank of a torchrun; returns the exit code."""
    parser = commandline.parser(ABOUT)
    commandline.require_torchrun(parser, arguments)

    from csipipe.comm.world import World
    from csipipe.run import training

    world = World.from_torchrun()
    try:
        settings, _ = commandline.settings(parser, arguments)
        training.launch(world, settings)
    except Exception as error:
        world.fail(error, "--debug" in arguments)
    return 0
