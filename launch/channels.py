"""Channels: python launch/channels.py generate DIR | check DIR | look DIR [--output FILE.png]"""

import sys

from csipipe.channels.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
