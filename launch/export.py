"""Encoder and decoder for deployment: python launch/export.py RUN --ue N [--bits B]"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("export"))
