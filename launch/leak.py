"""What a curious BTS can reconstruct: python launch/leak.py RUN [--compare RUN …]"""

import sys

from csipipe.entry import start
from csipipe.evaluation.leak import main

if __name__ == "__main__":
    sys.exit(start(main))
