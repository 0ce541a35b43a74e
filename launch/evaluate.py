"""Figures of a run's weights: python launch/evaluate.py RUN [--compare RUN …] [--data.… …]"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("evaluate"))
