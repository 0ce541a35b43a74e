"""Encoder and decoder for deployment: python launch/export.py RUN --ue N [--bits B]"""

from __future__ import annotations

import sys

from csipipe.settings import commandline

ABOUT = """Writes the encoder of a UE, and the decoder tail with the UE's head for the BTS, with
torch.export (.pt2) and as ONNX, checks both against the original on the run's test set, and adds
scripts that do feedback with them. With --bits the codeword is quantised."""


def main(arguments: list[str]) -> None:
    from csipipe.export import command

    parser = commandline.RunParser("launch/export.py", ABOUT)
    command.add_arguments(parser)
    try:
        options, settings = parser.parse(arguments)
        command.export(options, settings)
    except (OSError, RuntimeError, ValueError) as error:
        if "--debug" in arguments:
            raise
        sys.exit(f"csipipe: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
