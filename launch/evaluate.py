"""Figures of a finished run's weights: python launch/evaluate.py RUN [--data.… …]"""

from __future__ import annotations

import sys
from pathlib import Path

from csipipe import commandline

ABOUT = """Evaluates the weights of the run in folder RUN, in one process, without DeepSpeed: the
paper's loss and the centred NMSE per UE and mean. Settings are the run's; arguments after RUN
change them, for example --data.source csinet --data.path DIR for another test set."""


def main(arguments: list[str]) -> None:
    parser = commandline.parser(ABOUT)
    if not arguments or arguments[0].startswith("-"):
        parser.usage = "evaluate.py RUN [--section.key value …]"
        parser.print_help()
        sys.exit(0 if {"-h", "--help"} & set(arguments) else 2)
    run = Path(arguments[0])

    from csipipe import methods
    from csipipe.device import pick_device, set_threads
    from csipipe.tracking import test_table

    try:
        if not (run / "config.yaml").is_file():
            raise ValueError(f"{run} is no run: it has no config.yaml.")
        changed = ["--config", str(run / "config.yaml"), *arguments[1:]]
        settings, _ = commandline.settings(parser, changed)
        set_threads(settings.train.threads, ranks_on_node=1)
        device = pick_device(settings.train.device, local_rank=0)
        worker = methods.trained(settings, run / "weights", device)
        print(test_table(worker.evaluate("test").summary()))
    except (ValueError, OSError) as error:
        if "--debug" in arguments:
            raise
        sys.exit(f"csipipe: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
