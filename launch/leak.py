"""What a curious BTS can reconstruct: python launch/leak.py RUN [--compare RUN …]"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("leak"))
