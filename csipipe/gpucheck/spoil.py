"""The program, in which UE rank 1's first smashed data of iteration 3 hold a NaN."""

from __future__ import annotations

import os
import sys

import torch

from csipipe.comm.channel import Channel
from csipipe.comm.ledger import Kind
from csipipe.run import command


def main() -> None:
    """Run the program on this rank; the sending end of its channel is what goes wrong."""
    send, sent = Channel.send, 0

    def spoiled(channel: Channel, m: int, tensor: torch.Tensor) -> None:
        nonlocal sent
        if channel.kind is Kind.SMASHED and m == 0:
            sent += 1
            if sent == 3:
                tensor = tensor.detach().clone()
                tensor.view(-1)[1] = float("nan")
        send(channel, m, tensor)

    if os.environ["RANK"] == "1":
        Channel.send = spoiled  # type: ignore[method-assign, assignment]
    sys.exit(command.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
