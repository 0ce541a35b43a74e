"""One run of one method: torchrun --nproc_per_node=4 launch/train.py [--section.key value …]"""

import sys

from csipipe.__main__ import command

if __name__ == "__main__":
    sys.exit(command("train"))
