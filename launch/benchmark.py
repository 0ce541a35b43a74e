"""Our speed beside that of our peers, taking turns: python launch/benchmark.py [--json FILE]"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("benchmark"))
