"""Whatever a user hands in: a clean error or a result, never a crash.

`fuzzing.py` has how; other files are in `test_fuzz_files.py`, what programs say in
`test_fuzz_words.py`.
"""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from csifiles import images, save
from fuzzing import CASES, FEWER, damaged, repeat, said
from hypothesis import strategies as st
from torch import nn

from csipipe import checkpoint
from csipipe.channels.layout import Layout
from csipipe.channels.matfile import read_rows
from csipipe.channels.rawfile import read_variable
from csipipe.comm.topology import Topology
from csipipe.pipeline import balance
from csipipe.pipeline import settings as deepspeed
from csipipe.run.resuming import DEEPSPEED, decide
from csipipe.settings import commandline
from csipipe.settings.config import Precision, RunSettings, Settings

ROOT = Path(__file__).parents[2]
PARSER = commandline.parser("test")
SMALL = Layout("HT", (2, 4, 4), "2 x 4 angles x 4 delays", "f")


# what is typed


VALUES = st.one_of(
    st.integers().map(str),
    st.integers(-3, 40).map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "[]", "[0.9, 1]", "{}", "cpu", "drop", "fedavg", "1e-3", ""]),
    st.text(max_size=8),
    st.lists(st.integers(0, 5), max_size=3).map(str),
)


def near(value: Any) -> st.SearchStrategy[str]:
    """Values not far from a setting's default, as they are typed."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return st.just(value if isinstance(value, str) else json.dumps(value))
    low, high = sorted((value / 2, value * 2))
    if isinstance(value, int):
        return st.integers(int(low), int(high)).map(str)
    return st.floats(low, high).map(str)


@FEWER
def test_settings_are_read_or_refused(cases: int) -> None:
    defaults = commandline.dotted(commandline.plain(Settings()))
    names = st.sampled_from(list(defaults))
    good = names.flatmap(lambda name: st.tuples(st.just(name), near(defaults[name])))
    any_ = st.tuples(names | st.text(max_size=8), VALUES)
    accepted = []

    @repeat(cases, st.lists(good | any_, min_size=1, max_size=3))
    def check(changes: list[tuple[str, str]]) -> None:
        line = [f"--{name}={value}" for name, value in changes]
        try:
            found, _ = commandline.settings(PARSER, line)
        except (ValueError, OSError) as refusal:
            said(refusal)
            return
        except SystemExit:  # --help
            return
        again, _ = commandline.settings(PARSER, ["--config", commandline.to_yaml(found)])
        assert again == found
        accepted.append(found)

    check()
    assert len(accepted) > cases / 10


@CASES
def test_topologies_host_every_ue_once_or_are_refused(cases: int) -> None:
    world, number = st.integers(-2, 40), st.integers(1, 40)
    accepted = []

    @repeat(cases, world, number, number)
    def check(world: int, stages: int, ues: int) -> None:
        try:
            topology = Topology(world, stages, ues)
        except ValueError as refusal:
            said(refusal)
            return
        hosted = [ue for rank in topology.ue_roles for ue in topology.ues_of(rank)]
        assert hosted == list(range(ues))
        sizes = [len(topology.ues_of(rank)) for rank in topology.ue_roles]
        assert 0 < min(sizes) <= max(sizes) <= min(sizes) + 1
        hosts = [topology.host(ue) for ue in hosted]
        assert hosts == sorted(hosts)
        accepted.append((world, stages, ues))

    check()
    assert len(accepted) > cases / 10


@CASES
def test_partitions_give_every_stage_parameters(cases: int) -> None:
    layers = st.lists(st.tuples(st.floats(1e-6, 1e3), st.booleans()), min_size=1, max_size=9)

    @repeat(cases, layers, st.integers(1, 6))
    def check(timed: list[tuple[float, bool]], stages: int) -> None:
        tail = [nn.Linear(1, 1) if heavy else nn.Identity() for _, heavy in timed]
        seconds = [time for time, _ in timed]
        if stages > sum(heavy for _, heavy in timed):  # refused before
            return
        parts = balance.cut(seconds, tail, stages)
        assert (parts[0], parts[-1], len(parts)) == (0, len(tail), stages + 1)
        for start, stop in itertools.pairwise(parts):
            assert any(heavy for _, heavy in timed[start:stop])

    check()


# files


def mat_file(folder: Path, form: str) -> Path:
    """Three rows of the small layout."""
    file = folder / "DATA.mat"
    rows = images(3)[:, :, :4, :4].reshape(3, -1)
    if not form.startswith("v7.3"):
        return save(file, rows, do_compression=form.endswith("deflated"))
    options = {"chunks": (16, 2), "compression": "gzip"} if form.endswith("deflated") else {}
    with h5py.File(file, "w", userblock_size=512) as stored:
        made = stored.create_dataset("HT", data=rows.T, **options)
        made.attrs["MATLAB_class"] = np.bytes_("single")
    with file.open("rb+") as raw:
        raw.seek(124)
        raw.write(b"\x00\x02IM")
    return file


@CASES
@pytest.mark.parametrize("form", ["v5", "v5 deflated", "v7.3", "v7.3 deflated"])
def test_mat_files_are_read_or_refused(form: str, cases: int, tmp_path: Path) -> None:
    file = mat_file(tmp_path, form)

    def read() -> None:
        assert np.concatenate(list(read_rows(file, SMALL))).shape == (3, SMALL.width)

    def rows() -> None:
        for piece in read_rows(file, SMALL):
            assert piece.shape[1] == SMALL.width

    read()
    good = file.read_bytes()
    assert 0.1 < damaged(good, cases, file, rows) < 0.99


@CASES
@pytest.mark.parametrize("form", ["v5", "v5 deflated", "v7.3 deflated"])
def test_the_doctor_reads_or_refuses_mat_files(form: str, cases: int, tmp_path: Path) -> None:
    file = mat_file(tmp_path, form)

    def read() -> None:
        name, values = read_variable(file, SMALL)
        assert isinstance(name, str)
        assert isinstance(values, np.ndarray)

    assert 0.1 < damaged(file.read_bytes(), cases, file, read, named=False) < 0.99


@FEWER
def test_yaml_is_read_or_refused(cases: int, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"

    def read() -> None:
        commandline.settings(PARSER, ["--config", str(file)])

    good = commandline.to_yaml(Settings()).encode()
    assert 0.1 < damaged(good, cases, file, read, text=True, named=False) < 0.9


@CASES
def test_manifests_of_checkpoints_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    plain = commandline.plain(Settings())
    content = {"iteration": 7, "settings": plain, DEEPSPEED: deepspeed.of(Settings())}
    folder = checkpoint.commit(tmp_path / "7.partial", content_of(tmp_path, content), {})
    file = folder / "manifest.json"
    good = file.read_bytes()
    decide(Settings(run=RunSettings(resume=str(folder))), tmp_path / "run", again=False)

    def read() -> None:
        checkpoint.Snapshot(folder)

    assert damaged(good, cases, file, read) > 0.9


def content_of(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a snapshot in the making, whose folder is made as well."""
    (folder / "7.partial").mkdir()
    return content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@CASES
def test_deepspeed_files_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(shipped) > 2
    for good in shipped:
        precision: Precision = "bf16" if good.stem == "bf16" else "fp32"
        read = partial(deepspeed.load, str(file), precision)
        refused = damaged(good.read_bytes(), cases // 6, file, read, text=True)
        assert 0.1 < refused < 0.9
    names = st.sampled_from(
        ["bf16", "fp16", "torch_autocast", "zero_optimization", "gradient_clipping", "optimizer"]
    )
    inner = st.dictionaries(
        st.sampled_from(["enabled", "dtype", "stage", "offload_optimizer"]), JSON, max_size=3
    )
    fitting = [
        (key, value)
        for key, values in deepspeed.ALLOWED.items()
        for value in (values if isinstance(values, tuple) else (7,))
    ]

    accepted = []

    @repeat(
        cases // 2,
        st.lists(st.sampled_from(fitting), max_size=3),
        st.just({}) | st.dictionaries(names, JSON | inner, max_size=2),
    )
    def check(good: list[tuple[str, Any]], keys: dict[str, Any]) -> None:
        content: dict[str, Any] = {"gradient_clipping": 0.0}
        for name, value in good:
            first, _, inside = name.partition(".")
            if inside:
                content.setdefault(first, {})[inside] = value
            else:
                content[first] = value
        file.write_text(json.dumps(content | keys))
        try:
            accepted.append(deepspeed.load(str(file), "fp32"))
        except (ValueError, OSError) as refusal:
            said(refusal, file.name)

    check()
    print(len(accepted), "keys accepted of", cases // 2)
    assert len(accepted) > cases / 20
