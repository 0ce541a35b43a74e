"""Several models side by side: python launch/compare.py --models crnet,clnet --minutes 10"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("compare"))
