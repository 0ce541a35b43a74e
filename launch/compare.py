"""Several models side by side: python launch/compare.py --models crnet,clnet --minutes 10"""

import sys

from csipipe.compare.command import main
from csipipe.entry import start

if __name__ == "__main__":
    sys.exit(start(main))
