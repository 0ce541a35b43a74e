"""What a shell and a screen do to a command; refusals; a launcher that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentError
from pathlib import Path

import pytest

from csipipe import entry

ROOT = Path(__file__).parents[2]
LINE = [sys.executable, "-m", "csipipe", "--help"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_screen_without_a_character_shows_another(encoding: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    ended = subprocess.run(LINE, env=environment, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert b"csipipe COMMAND ?, each" in ended.stdout
    assert not ended.stderr


@pytest.mark.parametrize("both", [False, True])
def test_a_full_disk_behind_the_screen_fails_no_command(both: bool) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            LINE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=full if both else subprocess.PIPE,
            timeout=60,
        )
    assert ended.returncode == 0
    lost = b"csipipe: what was printed is lost: No space left on device\n"
    assert ended.stderr == (None if both else lost)


def test_a_reader_who_left_fails_no_command() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        LINE, env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("given", "taken"),
    [({}, True), ({"OMP_WAIT_POLICY": "ACTIVE"}, False), ({"GOMP_SPINCOUNT": "99"}, False)],
)
def test_threads_that_wait_sleep_soon(given: dict[str, str], taken: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_W", "GOMP_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose", **given}
    line = "from csipipe.entry import start; start(lambda words: bool(__import__('torch')))"
    ended = subprocess.run(
        [sys.executable, "-c", line], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (f"GOMP_SPINCOUNT = '{entry._SPINS}'" in ended.stderr) == taken, ended.stderr


def test_a_tilde_after_an_equals_sign_is_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["csipipe", "--out=~/x", "--a", "b=~", "~", "--c=x~"])
    found: list[str] = []
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # closed
    assert entry.start(lambda words: found.extend(words) or 0) == 0  # type: ignore[func-returns-value]
    assert found == ["--out=/home/me/x", "--a", "b=/home/me", "~", "--c=x~"]


def test_control_c_ends_any_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["csipipe"])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert entry.start(interrupted) == 130
    monkeypatch.setattr(sys, "argv", ["csipipe", "--debug"])
    with pytest.raises(KeyboardInterrupt):
        entry.start(interrupted)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\n  second"), "first\n  second"),
        (ArgumentError(None, "first\n  second"), "first second"),
    ],
)
def test_a_refusal_is_a_line_or_a_traceback_on_demand(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @entry.refusing(ArgumentError, ValueError)
    def main(arguments: list[str]) -> int:
        raise error if "--lookup" not in arguments else LookupError

    assert main([]) == 1
    assert capsys.readouterr().err == f"csipipe: error: {said}\n"
    with pytest.raises(type(error)):
        main(["--debug"])
    with pytest.raises(LookupError):
        main(["--lookup"])


LAUNCHER = """
import os, sys, time
from csipipe.comm import orphans
me = os.getpid()
for rank in range(2):
    if os.fork() == 0:
        orphans.watch(me, "torchrun", speaks=rank == 0)
        os.write(1, b"watching\\n")
        time.sleep(60)
time.sleep(60)
"""


def test_ranks_end_with_one_line_when_their_launcher_is_killed() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["watching\n"] * 2
    time.sleep(0.2)
    launcher.send_signal(signal.SIGKILL)
    _, said = launcher.communicate(timeout=20)  # until no rank holds the pipe
    [line] = said.splitlines()[1:]
    assert line.startswith("csipipe: error: torchrun, which started this run, is gone")
