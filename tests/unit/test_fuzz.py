"""Whatever a user hands in: a clean error or a result, never a crash. Long: 10,000 cases each."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from csifiles import images, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from csipipe import commandline
from csipipe.channels.layout import Layout
from csipipe.channels.matfile import read_rows
from csipipe.config import Settings
from csipipe.pipeline import balance
from csipipe.pipeline import settings as deepspeed
from csipipe.topology import Topology

ROOT = Path(__file__).parents[2]
CASES = pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.long)])
PARSER = commandline.parser("test")
SMALL = Layout("HT", (2, 4, 4), "2 x 4 angles x 4 delays", "f")


def repeat(cases: int, *strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Run a function on so many examples, the same ones every time."""

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
        setting: Any = settings(
            max_examples=cases,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=checks,
        )
        examples: Any = given
        run: Callable[[], None] = setting(examples(*strategies)(function))
        return run

    return decorate


def keys_of(plain: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of nested settings."""
    names = []
    for name, value in plain.items():
        names += keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return names


def defaults() -> dict[str, Any]:
    plain: dict[str, Any] = yaml.safe_load(commandline.to_yaml(Settings()))
    return plain


def said(refusal: Exception) -> None:
    """A refusal has a message."""
    assert str(refusal)


VALUES = st.one_of(
    st.integers().map(str),
    st.integers(-3, 40).map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "[]", "[0.9, 1]", "{}", "cpu", "drop", "fedavg", "1e-3", ""]),
    st.text(max_size=8),
    st.lists(st.integers(0, 5), max_size=3).map(str),
)


@CASES
def test_settings_are_read_or_refused(cases: int) -> None:
    names = st.sampled_from(keys_of(defaults()))

    @repeat(cases, st.dictionaries(names | st.text(max_size=8), VALUES, min_size=1, max_size=3))
    def check(changes: dict[str, str]) -> None:
        line = [f"--{name}={value}" for name, value in changes.items()]
        try:
            found, _ = commandline.settings(PARSER, line)
        except (ValueError, OSError) as refusal:
            said(refusal)
            return
        except SystemExit:  # an abbreviation of --help
            return
        assert isinstance(found, Settings)
        again, _ = commandline.settings(PARSER, ["--config", commandline.to_yaml(found)])
        assert again == found

    check()


@CASES
def test_topologies_host_every_ue_once_or_are_refused(cases: int) -> None:
    number = st.integers(-2, 40)

    @repeat(cases, number, number, number)
    def check(world: int, stages: int, ues: int) -> None:
        try:
            topology = Topology(world, stages, ues)
        except ValueError as refusal:
            said(refusal)
            return
        hosted = [ue for rank in topology.ue_ranks for ue in topology.ues_of(rank)]
        assert hosted == list(range(ues))
        sizes = [len(topology.ues_of(rank)) for rank in topology.ue_ranks]
        assert 0 < min(sizes) <= max(sizes) <= min(sizes) + 1
        assert [topology.host(ue) for ue in hosted] == sorted(topology.host(ue) for ue in hosted)

    check()


@CASES
def test_partitions_give_every_stage_parameters_or_are_refused(cases: int) -> None:
    layers = st.lists(st.tuples(st.floats(1e-6, 1e3), st.booleans()), min_size=1, max_size=9)

    @repeat(cases, layers, st.integers(1, 6))
    def check(timed: list[tuple[float, bool]], stages: int) -> None:
        tail = [nn.Linear(1, 1) if heavy else nn.Identity() for _, heavy in timed]
        seconds = [time for time, _ in timed]
        if stages > sum(heavy for _, heavy in timed):
            with pytest.raises(ValueError, match="use fewer stages"):
                balance.cut(seconds, tail, stages)
            return
        parts = balance.cut(seconds, tail, stages)
        assert (parts[0], parts[-1], len(parts)) == (0, len(tail), stages + 1)
        for start, stop in itertools.pairwise(parts):
            assert any(heavy for _, heavy in timed[start:stop])

    check()


def damage(good: bytes, chance: random.Random, head: int) -> bytes:
    """A file with a few bytes changed, mostly in its first `head`, cut off, or lengthened."""
    bad = bytearray(good)
    kind = chance.random()
    if kind < 0.2:
        return bytes(bad[: chance.randrange(len(bad))])
    if kind < 0.25:
        return bytes(bad) + chance.randbytes(chance.randrange(1, 200))
    for _ in range(chance.randrange(1, 6)):
        where = chance.randrange(min(head, len(bad)) if chance.random() < 0.8 else len(bad))
        bad[where] = chance.randrange(256)
    return bytes(bad)


def damaged(good: bytes, cases: int, head: int, file: Path, read: Callable[[], object]) -> int:
    """Read that many damaged files; how many were refused."""
    refused = 0
    chance = random.Random(0)
    for _ in range(cases):
        file.write_bytes(damage(good, chance, head))
        try:
            read()
        except (ValueError, OSError) as refusal:
            said(refusal)
            refused += 1
    return refused


def mat_file(folder: Path, form: str) -> Path:
    """Three rows of the small layout."""
    file = folder / "DATA.mat"
    rows = images(3)[:, :, :4, :4].reshape(3, -1)
    if form == "v7.3":
        with h5py.File(file, "w", userblock_size=512) as stored:
            stored.create_dataset("HT", data=rows.T).attrs["MATLAB_class"] = np.bytes_("single")
        content = bytearray(file.read_bytes())
        content[124:128] = b"\x00\x02IM"
        file.write_bytes(bytes(content))
        return file
    return save(file, rows, do_compression=form == "v5 compressed")


@CASES
@pytest.mark.parametrize("form", ["v5", "v5 compressed", "v7.3"])
def test_mat_files_are_read_or_refused(form: str, cases: int, tmp_path: Path) -> None:
    file = mat_file(tmp_path, form)

    def read() -> None:
        rows = np.concatenate(list(read_rows(file, SMALL)))
        assert rows.shape[1] == SMALL.width

    read()  # the undamaged one
    refused = damaged(file.read_bytes(), cases, 2500, file, read)
    assert refused > cases / 10


@CASES
def test_yaml_is_read_or_refused(cases: int, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"

    def read() -> None:
        commandline.settings(PARSER, ["--config", str(file)])

    refused = damaged(commandline.to_yaml(Settings()).encode(), cases, 10_000, file, read)
    assert refused > cases / 10


@CASES
def test_deepspeed_files_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    refused = 0
    for good in sorted((ROOT / "ds_configs").glob("*.json")):
        refused += damaged(
            good.read_bytes(), cases // 6, 10_000, file, lambda: deepspeed.load(str(file), "fp32")
        )
    assert refused > cases / 10
    names = st.sampled_from(
        ["bf16", "fp16", "torch_autocast", "zero_optimization", "gradient_clipping", "optimizer"]
    )
    inner = st.dictionaries(
        st.sampled_from(["enabled", "dtype", "stage", "offload_optimizer"]), JSON, max_size=3
    )

    @repeat(cases // 2, st.dictionaries(names, JSON | inner, max_size=4))
    def check(keys: dict[str, Any]) -> None:
        file.write_text(json.dumps({"gradient_clipping": 0.0} | keys))
        try:
            assert isinstance(deepspeed.load(str(file), "fp32"), dict)
        except (ValueError, OSError) as refusal:
            said(refusal)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
