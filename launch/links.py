"""Training over emulated links, as root: python launch/links.py --up 10mbit --down 50mbit"""

import sys

from csipipe.entry import start
from csipipe.links.command import main

if __name__ == "__main__":
    sys.exit(start(main))
