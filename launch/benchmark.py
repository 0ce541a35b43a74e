"""Our speed beside that of our peers, taking turns: python launch/benchmark.py [--json FILE]"""

import sys

from csipipe.bench.command import main
from csipipe.entry import start

if __name__ == "__main__":
    sys.exit(start(main))
