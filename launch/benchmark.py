"""Our speed beside that of our peers, taking turns: python launch/benchmark.py [--json FILE]"""

import sys

from csipipe.bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
