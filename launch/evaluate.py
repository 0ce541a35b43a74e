"""Figures of a run's weights: python launch/evaluate.py RUN [--compare RUN …] [--data.… …]"""

import sys

from csipipe.entry import start
from csipipe.evaluation.command import main

if __name__ == "__main__":
    sys.exit(start(main))
