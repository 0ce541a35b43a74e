"""One run of one method: torchrun --nproc_per_node=4 launch/train.py [--section.key value …]"""

import sys

from csipipe.entry import start
from csipipe.run.command import main

if __name__ == "__main__":
    sys.exit(start(main))
