"""The paper's table and figures: python launch/reproduce.py REPORT [options]; see --help."""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("reproduce"))
