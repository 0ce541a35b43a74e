"""Channels: python launch/channels.py generate DIR | check DIR | look DIR [--output FILE.png]"""

import sys

from csipipe.channels.command import main
from csipipe.entry import start

if __name__ == "__main__":
    sys.exit(start(main))
