"""python -m csipipe COMMAND …: what the scripts in launch/ do, without a checkout."""

from __future__ import annotations

import sys
from importlib import import_module

from csipipe.entry import start

COMMANDS = {
    "train": ("csipipe.run.command", "one run of one method, under torchrun or alone"),
    "evaluate": ("csipipe.evaluation.command", "figures of a run's weights"),
    "compare": ("csipipe.compare.command", "several models on the same data and budget"),
    "leak": ("csipipe.evaluation.leak", "what the BTS can reconstruct from what it sees"),
    "export": ("csipipe.export.command", "a trained encoder and decoder for deployment"),
    "reproduce": ("csipipe.reports.reproduce", "the paper's table and figures"),
    "benchmark": ("csipipe.bench.command", "seconds per iteration beside those of our peers"),
    "links": ("csipipe.links.command", "training over links of given rates, as root"),
    "channels": ("csipipe.channels.command", "generate, examine and draw CSI data"),
    "slurm": ("csipipe.run.scripts", "the sbatch scripts, to be copied and adapted"),
    "gpucheck": ("csipipe.gpucheck.command", "what a GPU does with csipipe, on one page"),
}
"""Module and purpose of each command; the module's `main` takes arguments, returns an exit code."""


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names, without importing the others."""
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        try:
            module = import_module(COMMANDS[name][0])
        except ModuleNotFoundError as error:
            package = (error.name or __package__).partition(".")[0]
            if package == __package__ or "--debug" in arguments:
                raise
            print(
                f"csipipe: error: {name} needs {package}, which can't be imported ({error}); "
                f"install it with: pip install {package}.",
                file=sys.stderr,
            )
            return 1
        code: int = module.main(arguments[1:])
        return code
    rows = "\n".join(f"  {key:<11}{about}" for key, (_, about) in COMMANDS.items())
    usage = f"usage: python -m csipipe COMMAND …, each with its --help:\n{rows}"
    if name in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    print(f"csipipe: error: unknown command {name!r}.\n{usage}", file=sys.stderr)
    return 2


def command(name: str) -> int:
    """As `main`, with the words behind the name of a script in launch/."""
    return start(lambda words: main([name, *words]))


if __name__ == "__main__":
    sys.exit(start(main))
