"""Channels: python launch/channels.py generate DIR | check DIR | look DIR [--output FILE.png]"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("channels"))
