"""Links by hand: rates, the forecast's schedule, networks that are made, shaped and cleaned."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import trainedruns

from csipipe import channels
from csipipe.links import command, forecast, network, page, ranks
from csipipe.links.network import Link, Network
from csipipe.links.ranks import Found, Trouble
from csipipe.methods.cost import shared_parts
from csipipe.reports import curves, preset
from csipipe.run import trained
from csipipe.settings.config import DataSettings, Settings

FREE = Link(1e15, 1e15)
NO_ROOT = os.geteuid() != 0 or shutil.which("tc") is None
needs_root = pytest.mark.skipif(NO_ROOT, reason="network namespaces need root, and tc")


def test_rates() -> None:
    assert network.rate("10mbit") == 1e7
    assert network.rate("1.5Gbit") == 1.5e9
    for text in ("10", "10mb", "-1mbit", "0kbit", "fast"):
        with pytest.raises(ValueError, match="is no rate"):
            network.rate(text)


def test_federated_transfers_are_one_after_the_other() -> None:
    settings = command._settings("fedavg", ["--topology.ues", "4"], 2)
    links = [Link(1e6, 4e6)] * 2
    one = shared_parts(settings)[0] * 32 * forecast.FRAME
    # two UEs of a rank share its link; nothing comes down before the last is up
    assert forecast.seconds(settings, links, 3.0) == pytest.approx(
        3 + 2 * one / 1e6 + 2 * one / 4e6
    )
    slow = [Link(1e6, 4e6), Link(1e5, 4e6)]
    for links in (slow, slow[::-1]):
        assert forecast.seconds(settings, links, 0) == pytest.approx(2 * one / 1e5 + 2 * one / 4e6)


def test_csilocals_transfers_overlap_by_micro_batch() -> None:
    words = ["--topology.ues", "2", "--model.c1", "64", "--model.c2", "64"]
    settings = command._settings("csilocal", [*words, "--train.micro_batches", "4"], 2)
    each = 8 * 64 * 32 * 1514 / 1448  # bits of a micro-batch, a kind, in frames with headers
    up = forecast.seconds(settings, [Link(1e6, 1e15)] * 2, 0)
    down = forecast.seconds(settings, [Link(1e15, 1e6)] * 2, 0)
    assert up == pytest.approx(8 * each / 1e6, rel=1e-6)  # 4 z and 4 gradients
    assert down == pytest.approx(8 * each / 1e6, rel=1e-6)
    both = forecast.seconds(settings, [Link(1e6, 1e6)] * 2, 0)
    assert 8 * each / 1e6 < both < 12 * each / 1e6  # less than 16, one after the other
    far = [Link(1e15, 1e15, delay=0.1)] * 2
    # zerobubble runs two micro-batches ahead, so the third waits for the first one's gradient
    assert forecast.seconds(settings, far, 0) == pytest.approx(0.6, rel=1e-6)
    gpipe = command._settings("csilocal", [*words, "--train.schedule", "gpipe"], 2)
    assert forecast.seconds(gpipe, far, 0) == pytest.approx(0.4, rel=1e-6)  # z, output and back
    heads = command._settings("csilocal", [*words, "--train.freeze", "encoder,tail"], 2)
    assert forecast.seconds(heads, far, 0) == pytest.approx(0.2, rel=1e-6)  # no gradient crosses
    codecs = ["--comm.codec.smashed", "int8", "--comm.codec.output_gradient", "int8"]
    fewer = command._settings("csilocal", [*words, *codecs], 2)
    shorter = forecast.seconds(fewer, [Link(1e6, 1e15)] * 2, 0)
    assert shorter == pytest.approx(up * (64 + 4) / (4 * 64), rel=1e-6)


def test_each_method_gets_settings_that_it_can_use() -> None:
    words = ["--train.local_steps", "2", "--comm.codec.update", "int8"]
    ours, theirs = (command._settings(method, words, 2) for method in ("csilocal", "fedavg"))
    assert (ours.train.local_steps, theirs.train.local_steps) == (1, 2)
    assert (ours.comm.codec.update, theirs.comm.codec.update) == (None, "int8")


def test_settings_of_csilocal_alone_are_no_obstacle() -> None:
    """More stages than one are the split tail's; a federated method has one."""
    words = ["--topology.stages", "3", "--train.stacked", "always"]
    ours, theirs = (command._settings(method, words, 2) for method in ("csilocal", "fedavg"))
    assert (ours.stages, theirs.stages) == (3, 1)
    assert forecast.seconds(theirs, [Link(1e6, 1e6)] * 2, 0) > 0
    pca = command._settings("csilocal", ["--model.start", "pca"], 2)
    assert pca.model.start == "pca"
    with pytest.raises(ValueError, match=r"model\.start is pca and method fedavg"):
        command._settings("fedavg", ["--model.start", "pca"], 2)


def test_an_averaging_follows_the_iteration() -> None:
    words = ["--topology.ues", "2", "--model.c1", "64", "--model.c2", "64"]
    links = [Link(1e6, 1e15)] * 2
    split = forecast.seconds(command._settings("csilocal", words, 2), links, 0)
    ends = 32 * forecast.FRAME * shared_parts(command._settings("splitfed", words, 2))[0] / 1e6
    planned = [
        forecast.seconds(
            command._settings("splitfed", [*words, "--train.aggregate_every", str(every)], 2),
            links,
            0,
        )
        for every in (1, 2, 3)
    ]
    # after every iteration, after half of them, and after few: the median
    assert planned == pytest.approx([split + ends, split + ends / 2, split], rel=1e-6)


def test_cases_have_a_link_for_each_ue_rank() -> None:
    words = ["--up", "1mbit,2mbit", "3mbit", "--delay", "20"]
    first, second = command._cases(
        command.parser().parse_args([*words, "--down", "8mbit", "9mbit"])
    )
    assert first.links == [Link(1e6, 8e6, 0.02), Link(2e6, 8e6, 0.02)]
    assert second.links == [Link(3e6, 9e6, 0.02)] * 2
    both = [case.links for case in command._cases(command.parser().parse_args(words))]
    assert both == [[Link(1e6, 1e6, 0.02), Link(2e6, 2e6, 0.02)], [Link(3e6, 3e6, 0.02)] * 2]


def test_a_troubled_link_is_whole_again_after_a_while() -> None:
    link, done = Link(1e6, 2e6, 0.1), list[tuple[object, ...]]()
    net: Any = SimpleNamespace(
        links=[link, link],
        connect=lambda host, whole: done.append((host, whole)),
        shape=lambda host, new: done.append((host, new)),
    )
    for trouble in (Trouble(1, 10, 20), Trouble(1, 10, 20, 5e4)):
        steps = list(ranks._steps(net, trouble))
        assert [at for at, _ in steps] == [10, 30]
        for _, step in steps:
            step()
    assert done == [(1, False), (1, True), (1, Link(5e4, 5e4, 0.1)), (1, link)]


def test_a_link_is_shaped_at_both_ends_with_bursts_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(network, "_tc", lambda *words: told.append(" ".join(words[1:])))
    link = Link(8e7, 8e6, 0.02)
    Network([link]).shape(0, link, "add")
    up, later, down, later_too = told
    assert "dev csi0 root handle 1: tbf rate 80000000bit burst 20000b" in up  # 2 ms of it
    assert "dev ue0 root handle 1: tbf rate 8000000bit burst 5000b" in down  # whole frames
    assert "netem delay 20.000ms" in later
    assert "netem delay 20.000ms" in later_too


def test_trouble_is_read() -> None:
    assert Trouble.read("1:10:20", 2) == Trouble(1, 10, 20)
    assert Trouble.read("0:1:2:100kbit", 2) == Trouble(0, 1, 2, 1e5)
    for text in ("2:1:1", "0:1", "a:1:1", "0:-1:2", "0:1:2:fast", "0:1:2:1mbit:3"):
        with pytest.raises(ValueError, match="expected UE:AT:FOR"):
            Trouble.read(text, 2)


@pytest.mark.skipif(NO_ROOT, reason="the first complaint is of root")
@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--up", "10mbits"], "--up: '10mbits' is no rate"),
        (["--up", "1mbit,2mbit,3mbit"], "3 rates"),
        (["--up", "1mbit", "2mbit", "--down", "1mbit", "2mbit", "3mbit"], "give as many"),
        (["--up", "1mbit", "--methods", "fedavgg"], "must be one of"),
        (["--up", "1mbit", "--methods", "centralised"], "has no links"),
        (["--up", "1mbit", "--hosts", "9"], "there are 4 UEs"),
        (["--up", "1mbit", "--delay", "-1"], "--delay is -1.0"),
        (["--up", "1mbit", "--topology.participants", "2"], "of iterations of all UEs"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*words, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert what in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_who_isnt_root_or_has_no_tc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="needs root"):
        network.check_machine()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="iproute2"):
        network.check_machine()


def test_the_page_says_what_was_measured_and_what_failed(tmp_path: Path) -> None:
    words = ["--up", "1mbit", "2mbit", "--methods", "fedavg", "--trouble", "0:1:2"]
    options = command.parser().parse_args(words)
    runs = {"fedavg": command._settings("fedavg", [], 2)}
    fine = page.Row("fedavg", "1mbit", 0.5, 10.0, Found(11.0, 120.0, 1.05), 40)
    broken = Found(math.nan, math.nan, math.nan, "nobody answers (see a log)")
    rows = [fine, page.Row("fedavg", "2mbit", 0.5, 5.0, broken, None)]
    text = page.text(runs, rows, options)
    assert "| FedAvg | 1mbit | 0.500 | 10.000 | 11.000 | 1.10 | 1.050 |" in text
    assert "| FedAvg | 2mbit | 0.500 | 5.000 | — | — | — |" in text
    assert "- fedavg, 2mbit: nobody answers (see a log)" in text
    assert "fedavg 1mbit: 120.0; fedavg 2mbit: —." in text
    assert fine.reaches == 440
    page.write(rows, text, tmp_path)
    assert (tmp_path / "links.png").stat().st_size > 1000
    line, _ = csv.DictReader((tmp_path / "links.csv").read_text().splitlines())
    names = ("free_s", "planned_s", "measured_s", "overhead", "in_all_s", "s_to_loss")
    assert [float(line[name]) for name in names] == [0.5, 10, 11, 1.05, 120, 440]
    assert (tmp_path / "links.md").read_text() == text


def test_a_method_that_fails_without_links_isnt_tried_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(settings: Settings, *rest: Any) -> Found:
        trained.append(settings.method)
        if settings.method == "fedavg":
            return Found(math.nan, math.nan, math.nan, "out of memory (see a log)")
        return Found(2.0, 20.0, 1.05)

    monkeypatch.setattr(ranks, "train", train)
    monkeypatch.setattr(network, "check_machine", lambda: None)
    monkeypatch.setattr(network, "clean", lambda: [])
    monkeypatch.setattr(network, "Network", nullcontext)
    words = ["--up", "1mbit", "2mbit", "--methods", "fedavg", "csilocal"]
    assert command.main([*words, "--out", str(tmp_path)]) == 1
    assert trained == ["fedavg", *["csilocal"] * 3]
    text = capsys.readouterr().out
    assert "| FedAvg | none | — | — | — | — | — |" in text
    assert "- fedavg, none: out of memory (see a log)" in text
    assert "nan" not in text
    assert "| CSILocal | 2mbit | 2.000 |" in text
    assert (tmp_path / "links.png").is_file()
    shutil.rmtree(tmp_path)  # over one link there is no picture, and "none" is no other one
    assert command.main([*words, "--up", "1mbit", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "links.png").exists()


def test_links_that_a_kernel_refuses_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(links: list[Link]) -> NoReturn:
        raise ValueError(f"this kernel has no netem for {links[0].delay:g} s")

    monkeypatch.setattr(ranks, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(network, "check_machine", lambda: None)
    monkeypatch.setattr(network, "clean", lambda: [])
    monkeypatch.setattr(network, "Network", refuse)
    words = ["--up", "1mbit", "--delay", "5", "--methods", "fedavg", "--out", str(tmp_path)]
    assert command.main(words) == 1
    assert "error: this kernel has no netem for 0.005 s" in capsys.readouterr().err


PRESET = """--model.angles 16 --model.delays 8 --model.c1 64 --model.c2 64
--data.environment outdoor --data.test_samples 800 --data.holdout 0 --train.batch_size 106
--train.micro_batches 2 --train.local_steps 2 --train.lr_schedule constant"""
"""The settings of docs/links.md beside --curves of the reports' runs."""


@pytest.mark.parametrize("method", ["csilocal", "fedavg", "fedprox"])
def test_curves_of_the_reports_go_with_the_settings_that_the_page_names(method: str) -> None:
    words = [*PRESET.split(), "--train.iterations", "20"]
    curve = preset.load("laptop").settings(method, "outdoor", 4, seed=1)
    assert curve.train.iterations == 300
    page._check_curve("run", channels.sized(curve), command._settings(method, words, 2))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("--data.seed 1", "data.seed"),
        ("--data.environment indoor", "data.environment"),
        ("--comm.codec.smashed int8", "comm.codec.smashed"),
        ("--train.loss nmse", "train.loss"),
        ("--train.micro_batches 1", "train.micro_batches"),
        ("--topology.ues 8", "topology.ues"),
        ("--model.c1 32", "model.c1"),
    ],
)
def test_curves_of_something_else_are_refused(words: str, key: str) -> None:
    ours = command._settings("csilocal", PRESET.split(), 2)
    theirs = command._settings("csilocal", [*PRESET.split(), *words.split()], 2)
    value = words.split()[1]
    with pytest.raises(
        ValueError, match=rf"run was trained with {key} {value}, .* --{key} {value}"
    ):
        page._check_curve("run", theirs, ours)


def test_a_curve_is_read_only_if_it_is_of_the_same_task(tmp_path: Path) -> None:
    settings = trainedruns.finish(tmp_path / "run").settings
    ours = channels.sized(settings)
    ours = replace(ours, data=replace(ours.data, seed=ours.data.seed + 1))
    with pytest.raises(ValueError, match=r"run was trained with data\.seed \d, links trains with"):
        page.times_to([str(tmp_path / "run")], {"csilocal": ours}, None)


def test_bytes_on_the_links_are_compared_with_all_that_the_ledger_counts(tmp_path: Path) -> None:
    parts = ("exchanged", "exchanged_buffers", "exchanged_evaluation")
    counted = {part: {"bytes": {"up": n, "down": 10 * n}} for n, part in enumerate(parts, 1)}
    summary = counted | {"seconds_per_iteration": 0.5, "seconds_total": 60}
    (tmp_path / "log").write_text("csipipe: error: nobody answers\n")
    found = ranks._found(tmp_path, tmp_path / "log", 132)
    assert found.error.startswith("nobody answers")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert ranks._found(tmp_path, tmp_path / "log", 132) == Found(0.5, 60, 2.0)


def test_curves_of_other_files_are_refused() -> None:
    here, there = (
        Settings(data=DataSettings(source="files", path=place)) for place in ("here", "there")
    )
    with pytest.raises(ValueError, match=r"run was trained with data\.path there, links trains"):
        page._check_curve("run", there, here)


def test_the_loss_is_reached_at_the_first_evaluation_that_is_no_higher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {"csilocal": [0.8, 0.5, 0.4], "fedavg": [0.9, 0.6, 0.5]}
    runs = {method: command._settings(method, [], 2) for method in losses}
    monkeypatch.setattr(page, "_check_curve", lambda *_: None)
    monkeypatch.setattr(trained, "read", lambda folder: SimpleNamespace(settings=runs[folder.name]))
    monkeypatch.setattr(
        curves,
        "read",
        lambda folder: SimpleNamespace(
            iterations=[10, 20, 30], loss=losses[folder.name], lowest=min(losses[folder.name])
        ),
    )
    # the lowest that both reach is FedAvg's
    assert page.times_to([*losses], runs, None) == {"csilocal": 20, "fedavg": 30}
    assert page.times_to([*losses], runs, 0.6) == {"csilocal": 20, "fedavg": 20}
    assert page.times_to([*losses], runs, 0.45) == {"csilocal": 30, "fedavg": None}


def names() -> set[str]:
    place = Path("/run/netns")
    return {one.name for one in place.iterdir()} if place.exists() else set()


@needs_root
def test_networks_reach_the_bts_at_their_rate_and_go_away() -> None:
    before = names()
    with Network([Link(1e6, 2e6), Link(3e6, 3e6)]) as net:
        assert len(names() - before) == 3
        ping = ["ip", "netns", "exec", net.ues[1], sys.executable, "-c"]
        code = f"import socket; socket.create_connection(('{network.BTS}', 9), 5)"
        done = subprocess.run([*ping, code], capture_output=True, text=True)
        assert "refused" in done.stderr  # it is reached, and nobody listens there
        assert "rate 3Mbit" in qdisc(net.ues[1], network.INTERFACE)
        assert "rate 2Mbit" in qdisc(net.bts, "ue0")
        net.shape(0, Link(5e5, 5e5))
        assert "rate 500Kbit" in qdisc(net.ues[0], network.INTERFACE)
        assert net.crossed(1) > (0, 0)
        net.connect(1, whole=False)
        done = subprocess.run([*ping, code.replace("5)", "1)")], capture_output=True, text=True)
        assert "timed out" in done.stderr or "unreachable" in done.stderr
        assert net.of_rank(0, stages=2) == net.of_rank(1, stages=2) == net.bts
        assert net.of_rank(3, stages=2) == net.ues[1]
    assert names() == before


def qdisc(name: str, interface: str) -> str:
    words = ["tc", "-n", name, "qdisc", "show", "dev", interface]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@needs_root
def test_what_a_killed_run_left_is_cleaned_and_nothing_else() -> None:
    code = """
import os, signal
from csipipe.links.network import Link, Network
with Network([Link(1e6, 1e6)]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    process.wait()
    left = {f"{network.PREFIX}{process.pid}-bts", f"{network.PREFIX}{process.pid}-ue0"}
    other = f"other-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", other], check=True)
    try:
        with Network([Link(1e6, 1e6)]) as running:
            assert left <= names()
            assert left <= set(network.clean())
            assert not left & names()
            assert {other, running.bts, *running.ues} <= names()
    finally:
        subprocess.run(["ip", "netns", "del", other], check=True)
