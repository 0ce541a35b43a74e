"""TensorBoard as a user starts it, on runs made as a user makes them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = {
    "model.c1": "24",
    "model.c2": "16",
    "model.angles": "16",
    "model.delays": "16",
    "data.train_samples": "400",
    "data.test_samples": "60",
    "train.iterations": "20",
    "train.batch_size": "8",
    "run.eval_every": "4",
}
_PATIENCE = 90.0


def train(folder: Path, **settings: str) -> Path:
    """A finished tiny run in `folder`, made as a user makes it."""
    chosen = {**TINY, "run.dir": str(folder)}
    chosen |= {name.replace("__", "."): value for name, value in settings.items()}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    arguments = [text for key, value in chosen.items() for text in (f"--{key}", value)]
    ended = subprocess.run(
        [*line, "launch/train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """The address of a TensorBoard on `logdir`, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _answers(f"{url}/data/plugins_listing", process)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        assert process.poll() is None, "TensorBoard ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, f"{url} doesn't answer"
            time.sleep(0.5)
