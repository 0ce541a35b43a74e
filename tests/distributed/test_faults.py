"""Every fault ends the run, soon, with one message that names what really happened.

`pytest tests/distributed/test_faults.py -m long -s` prints the table of all of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from faults import Fault
from harness import Program, errors
from test_interrupted_runs import whole
from test_run import arguments

from csipipe.comm.ledger import Kind
from csipipe.comm.topology import Topology
from csipipe.pipeline.schedule import Op

TIMEOUT = 3.0
ROLE = Topology(4, 2, 4).role
SENDER = {
    Kind.SMASHED: 2,
    Kind.OUTPUT: 1,
    Kind.OUTPUT_GRADIENT: 2,
    Kind.SMASHED_GRADIENT: 0,
    Kind.ACTIVATION: 0,
    Kind.ACTIVATION_GRADIENT: 1,
    Kind.REPORT: 2,
}
BTS_OPS = (
    Op.RECEIVE_FORWARD,
    Op.FORWARD,
    Op.SEND_FORWARD,
    Op.RECEIVE_BACKWARD,
    Op.BACKWARD,
    Op.SEND_BACKWARD,
    Op.WEIGHTS,
    Op.STEP,
)
UE_OPS = (
    Op.ENCODE,
    Op.SEND_FORWARD,
    Op.RECEIVE_FORWARD,
    Op.HEAD,
    Op.SEND_BACKWARD,
    Op.WEIGHTS,
    Op.RECEIVE_BACKWARD,
    Op.ENCODE_BACKWARD,
    Op.STEP,
)
CHECKED = (Kind.SMASHED, Kind.OUTPUT, Kind.OUTPUT_GRADIENT, Kind.SMASHED_GRADIENT)


def expected(fault: Fault) -> str:
    """What the one message must say."""
    culprit = re.escape(ROLE(fault.rank))
    if fault.what in ("kill", "freeze"):
        state = "gone" if fault.what == "kill" else "silent"
        if fault.at not in (Op.WEIGHTS, Op.STEP, Op.VERDICT):
            return rf"{culprit} is {state}: .*iteration {fault.iteration}, waited for"
        # who has sent everything when it fails is missed in the next iteration, or when a
        # checkpoint is complete: all wait for texts then, which no broken connection ends
        missed = (
            rf"{culprit} is {state}: .*iteration ({fault.iteration}|{fault.iteration + 1}), waited"
        )
        return rf"{missed}|{culprit} is silent: .*waited for its text \(written parts\)"
    if fault.what == "raise":
        return rf"{culprit}, iteration {fault.iteration}: RuntimeError: injected"
    if fault.what == "drop":
        # a sender that has nothing else to wait for is silent; else all wait for each other
        return rf"a message was lost.*iteration {fault.iteration}|is silent: .*waited for"
    if fault.what == "lengthen":  # gloo ends the receiver, and its neighbours name it
        return rf"is gone: .*iteration {fault.iteration}, waited for"
    source = culprit if fault.rank < 2 else r"UE \d \(UE rank 2 \(UEs 0-1\)\)"
    return rf"iteration {fault.iteration}: .* from {source} holds nan in 1 of"


def run(fault: Fault, folder: Path, method: str, **changed: str) -> tuple[Fault, float, float, str]:
    """The fault, seconds until the first rank ended and until all had, and the message."""
    settings = arguments(
        folder,
        method=method,
        train__iterations="100000",
        run__eval_every="50000",
        run__save_every="1",
        run__timeout=str(TIMEOUT),
        data__holdout="0",
        **changed,
    )
    frozen = fault.rank if fault.what == "freeze" else None
    ranks = 4 if method == "csilocal" else 3
    if changed.get("topology__placement") == "together":
        ranks = 2
    with Program(ranks, settings, fault) as program:
        started = program.wait_for_fault()
        first = program.first_end(without=frozen) - started
        ended = program.join(timeout=120, without=frozen)
        seconds = time.monotonic() - started
    assert all(rank.code for i, rank in enumerate(ended) if i != frozen), ended
    messages = errors(ended)
    assert len(messages) == 1, (str(fault), messages)
    return fault, first, seconds, messages[0]


def check(faults: Sequence[Fault], folder: Path, **changed: str) -> None:
    """Run the faults, four at a time (they mostly wait), and print the table."""

    def one(i: int) -> tuple[Fault, float, float, str]:
        return run(faults[i], folder / str(i), "csilocal", **changed)

    with ThreadPoolExecutor(4) as pool:
        results = pool.map(one, range(len(faults)))
        for i, (fault, first, seconds, message) in enumerate(results):
            print(f"| {fault} | {first:.1f} s | {seconds:.1f} s | {message[16:]} |", flush=True)
            assert re.search(expected(fault), message), (str(fault), message)
            assert seconds < TIMEOUT + 10, (str(fault), seconds)
            assert whole(folder / str(i)).name == "1", str(fault)


def everything() -> Iterator[Fault]:
    for what in ("raise", "kill", "freeze"):
        for rank, ops in ((0, BTS_OPS), (1, BTS_OPS), (2, UE_OPS)):
            for op in ops:
                yield Fault(rank, what, op)
    for kind, rank in SENDER.items():
        yield Fault(rank, "drop", kind)
    for kind in CHECKED:
        for what in ("corrupt", "shorten", "lengthen"):
            yield Fault(SENDER[kind], what, kind, micro_batch=1)


def test_faults_are_named(tmp_path: Path) -> None:
    faults = [
        Fault(2, "raise", Op.ENCODE_BACKWARD),
        Fault(1, "kill", Op.BACKWARD),
        Fault(0, "freeze", Op.FORWARD),
        Fault(3, "freeze", Op.HEAD),
        Fault(1, "drop", Kind.ACTIVATION_GRADIENT),
        Fault(2, "corrupt", Kind.OUTPUT_GRADIENT, micro_batch=1),
        Fault(1, "shorten", Kind.OUTPUT, micro_batch=1),
        Fault(2, "lengthen", Kind.SMASHED, micro_batch=1),
    ]
    check(faults, tmp_path)


def test_a_rank_with_two_roles_is_named_by_both(tmp_path: Path) -> None:
    faults = [
        Fault(1, "kill", Op.HEAD),
        Fault(0, "freeze", Op.BACKWARD),
        Fault(1, "raise", Op.ENCODE_BACKWARD),
    ]
    folders = [tmp_path / str(i) for i in range(len(faults))]
    together = partial(run, method="csilocal", topology__placement="together")
    with ThreadPoolExecutor(3) as pool:
        messages = [found[3] for found in pool.map(together, faults, folders)]
    for fault, folder, message in zip(faults, folders, messages, strict=True):
        role = re.escape(Topology(2, 2, 4, together=True).role(fault.rank))
        state = {"kill": " is gone: .*", "freeze": " is silent: .*", "raise": ", "}[fault.what]
        end = ": RuntimeError: injected" if fault.what == "raise" else ", waited for"
        assert re.search(rf"{role}{state}iteration {fault.iteration}{end}", message), message
        assert whole(folder).name == "1"


@pytest.mark.long
def test_faults_of_federated_ues_are_named(tmp_path: Path) -> None:
    faults = [Fault(2, "freeze", Kind.UPDATE), Fault(1, "kill", Kind.STATISTICS)]
    settings = [Topology(3, 1, 4).role(fault.rank) for fault in faults]
    for i, (fault, role) in enumerate(zip(faults, settings, strict=True)):
        message = run(fault, tmp_path / str(i), "fedavg")[3]
        assert message.startswith(f"csipipe: error: {role} is "), message


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_every_fault_at_every_instruction_is_named(part: int, tmp_path: Path) -> None:
    check(list(everything())[part::8], tmp_path)


@pytest.mark.long
def test_faults_at_what_drop_adds_are_named(tmp_path: Path) -> None:
    faults = [
        Fault(rank, what, op)
        for what in ("raise", "kill", "freeze")
        for rank in range(3)
        for op in (Op.ROLL_CALL, Op.VERDICT)
    ]
    others = [Fault(2, "kill", Op.ENCODE_BACKWARD), Fault(1, "freeze", Op.STEP)]
    check([*faults, *others], tmp_path, train__on_bad_ue="drop")
