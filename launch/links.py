"""Training over emulated links, as root: python launch/links.py --up 10mbit --down 50mbit"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("links"))
