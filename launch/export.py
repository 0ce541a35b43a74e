"""Encoder and decoder for deployment: python launch/export.py RUN --ue N [--bits B]"""

import sys

from csipipe.entry import start
from csipipe.export.command import main

if __name__ == "__main__":
    sys.exit(start(main))
