"""The paper's table and figures: python launch/reproduce.py REPORT [options]; see --help."""

import sys

from csipipe.entry import start
from csipipe.reports.reproduce import main

if __name__ == "__main__":
    sys.exit(start(main))
