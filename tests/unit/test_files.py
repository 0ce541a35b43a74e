"""csipipe's own format: what is written is read, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csipipe.channels import (
    Deal,
    Span,
    common_test,
    deal,
    load_ue,
    manifest_of,
    open_source,
    rows_of,
)
from csipipe.channels.format import NAME, Description, Set, Stored, open_rows
from csipipe.channels.writer import Writer, file_name
from csipipe.settings import commandline
from csipipe.settings.config import DataSettings, Settings

A, D, K = 6, 4, 9
SIZES = {("office", "train"): 30, ("office", "val"): 10, ("office", "test"): 8}


def images(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random((count, 2, A, D), np.float32)


def written(folder: Path, sizes: dict[Any, int] = SIZES, **said: Any) -> DataSettings:
    with Writer(folder) as out:
        for seed, ((environment, part), rows) in enumerate(sizes.items()):
            whole = images(rows, seed)
            hf = np.random.default_rng(seed).random((rows, A, K, 2)).view(complex)[..., 0]
            for piece in (slice(0, 3), slice(3, rows)):
                more = hf[piece].astype("c8") if part == "test" else None
                out.add(environment, part, whole[piece], np.ones(rows, "f4")[piece], more)
        out.finish(lambda sets: Description(angles=A, delays=D, subcarriers=K, sets=sets, **said))
    return DataSettings(source="files", path=str(folder))


def change(folder: Path, **values: Any) -> None:
    content = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps(content | values))


def test_rows_come_back(tmp_path: Path) -> None:
    data = written(tmp_path / "x")
    source = open_source(data)
    assert (source.size, source.padded, source.kind) == ((A, D), K, "channel")
    assert source.environments == ("office",)
    np.testing.assert_array_equal(source.rows("office", "test", 2, 8), images(8, 2)[2:])
    train = source.rows("office", "train", 0, 40)
    both = np.concatenate([images(30, 0), images(10, 1)])
    assert not np.array_equal(train, both)
    np.testing.assert_array_equal(np.sort(train, axis=0), np.sort(both, axis=0))
    np.testing.assert_array_equal(train[5:9], open_source(data).rows("office", "train", 5, 9))
    hf = source.frequency_rows("office", "test", 1, 8)
    assert not isinstance(hf, str)
    wanted = np.random.default_rng(2).random((8, A, K, 2)).view(complex)[..., 0].astype("c8")
    np.testing.assert_array_equal(hf, wanted[1:])
    assert isinstance(source.frequency_rows("office", "train", 0, 1), str)
    identity = source.identity("office", "test")
    assert (
        identity["order_sha256"] == hashlib.sha256(np.arange(8, dtype="<i8").tobytes()).hexdigest()
    )
    [file] = identity["files"]
    content = (tmp_path / "x" / "office-test.npy").read_bytes()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert np.load(tmp_path / "x" / "office-train.npy").shape == (30, 2, A, D)  # NumPy reads it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_an_environment_by_default_is_all_of_them(tmp_path: Path) -> None:
    sizes = {(e, p): n for e in ("a b", "ü") for p, n in (("train", 21), ("test", 5))}
    data = written(tmp_path / "x", sizes)
    source = open_source(data)
    dealt = deal(data, 4, source.available, source.environments)
    assert [sum(span.size for span in spans) for spans in dealt.ues] == [11, 11, 10, 10]
    assert len(rows_of(source, dealt.test)) == 10
    for number, environment in enumerate(source.environments):
        order = np.random.default_rng(np.random.SeedSequence((0, number))).permutation(21)
        digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
        assert source.identity(environment, "train")["order_sha256"] == digest
    manifest_of(dealt, 0.1, source).write(tmp_path)
    assert Settings(data=data).data.environment == "all"
    assert Settings().data.environment == "indoor"
    parsed = commandline.read(["--data.source=files", "--data.path=x"])
    assert parsed.data.environment == "all"
    with pytest.raises(ValueError, match=r"data.environment is c; the data has a b, ü"):
        common_test(
            DataSettings(source="files", path="x", environment="c"),
            source.available,
            source.environments,
        )


def test_a_file_per_ue(tmp_path: Path) -> None:
    rows = (12, 5, 30)
    sizes = {(f"ue-{n}", p): r for n, r in enumerate(rows) for p in ("train", "test")}
    data = written(tmp_path / "x", sizes)
    source = open_source(data)
    dealt = deal(data, 3, source.available, source.environments)
    for ue, count in enumerate(rows):
        [span] = dealt.ues[ue]
        assert (span.environment, span.size) == (f"ue-{ue}", count)
        train, _ = load_ue(source, dealt, ue, 0.0)
        np.testing.assert_array_equal(np.sort(train, 0), np.sort(images(count, 2 * ue), 0))
    assert sum(span.size for span in dealt.test) == sum(rows)
    with pytest.raises(ValueError, match=r"topology.ues is 4; .* a file for each of 3 UEs"):
        deal(data, 4, source.available, source.environments)


def test_what_the_doctor_finds_is_said_once_and_refused_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).random((100, 2, 16, 32), np.float32)
    with Writer(tmp_path / "x") as out:
        out.add("office", "train", noise)
        out.add("office", "test", noise[:8])
        out.finish(lambda sets: Description(angles=16, delays=32, sets=sets))
    data = DataSettings(source="files", path=str(tmp_path / "x"))
    open_source(data).rows("office", "train", 0, 20)
    file = tmp_path / "x" / "office-train.npy"
    assert f"csipipe: {file}: suspicious: energy is spread over all" in capsys.readouterr().err
    open_source(data).rows("office", "train", 0, 20)
    assert not capsys.readouterr().err
    strict = dataclasses.replace(data, accept="good")
    with pytest.raises(ValueError, match=r"office-train.npy: suspicious.*set data\.accept to susp"):
        open_source(strict).rows("office", "train", 0, 20)
    open_source(strict).rows("office", "test", 0, 8)  # too few rows to be judged


def test_values_out_of_range_need_a_setting_and_nan_is_refused(tmp_path: Path) -> None:
    rows = images(8)
    for name, value in (("wide", 1.5), ("nan", np.nan)):
        rows[4, 0, 1, 2] = value
        with Writer(tmp_path / name) as out:
            out.add("all", "test", rows)
            out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
    with Writer(tmp_path / "low") as out:
        out.add("all", "test", images(8) - np.float32(0.25))
        out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
    low = open_source(DataSettings(source="files", path=str(tmp_path / "low")))
    with pytest.raises(ValueError, match=r"unusable: values lie in \[-0\.2"):
        low.rows("all", "test", 0, 8)
    wide = DataSettings(source="files", path=str(tmp_path / "wide"))
    with pytest.raises(ValueError, match=r"unusable: values lie in.* 1\.5\].*accept to unusable"):
        open_source(wide).rows("all", "test", 0, 8)
    assert (
        open_source(dataclasses.replace(wide, accept="unusable")).rows("all", "test", 0, 8).max()
        == 1.5
    )
    silent = images(8)
    silent[5] = 0.5
    with Writer(tmp_path / "silent") as out:
        out.add("all", "test", silent)
        out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
    without = dataclasses.replace(wide, path=str(tmp_path / "silent"), accept="unusable")
    with pytest.raises(ValueError, match=r"row 5 \(counted from 0\) is 0.5 throughout: a channel"):
        open_source(without).rows("all", "test", 0, 8)
    broken = dataclasses.replace(wide, path=str(tmp_path / "nan"), accept="unusable")
    with pytest.raises(ValueError, match=r"NaN or infinite values in rows 0 … 7"):
        open_source(broken).rows("all", "test", 0, 8)


@pytest.mark.parametrize("source", ["synthetic", "files"])
def test_dirichlet_shares_divide_every_environment(tmp_path: Path, source: str) -> None:
    path = None
    if source == "files":
        path = str(tmp_path / "x")
        written(tmp_path / "x", {(e, p): 90 for e in "abc" for p in ("train", "test")})
    spread = {}
    for alpha in (0.1, 100.0):
        data = DataSettings(source=source, path=path, environment="noniid", alpha=alpha)
        opened = open_source(data)
        dealt = deal(data, 5, opened.available, opened.environments)
        assert dealt == deal(data, 5, opened.available, opened.environments)
        for site in opened.environments:
            mine = [s for spans in dealt.ues for s in spans if s.environment == site]
            ends = sorted((span.start, span.stop) for span in mine)
            assert ends[0][0] == 0
            assert all(one[1] == next_one[0] for one, next_one in pairwise(ends))
            assert ends[-1][1] == (90 if path else 4000)
        assert all(dealt.ues)
        first = opened.environments[0]
        of_first = [sum(s.size for s in u if s.environment == first) for u in dealt.ues]
        spread[alpha] = max(of_first) - min(of_first)
    assert spread[0.1] > 3 * spread[100.0]
    with pytest.raises(ValueError, match=r"data.alpha is 0.5, but data.environment indoor"):
        DataSettings(alpha=0.5)


def test_an_exchanged_file_is_never_used(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    data = written(folder)
    file = folder / "office-test.npy"
    before, state = file.read_bytes(), file.stat()
    open_source(data).rows("office", "test", 0, 2)
    other = before[:-4] + b"\0\0\0\0"

    def in_place() -> None:
        file.write_bytes(other)

    def renamed() -> None:
        (folder / "new").write_bytes(other)
        os.utime(folder / "new", ns=(state.st_atime_ns, state.st_mtime_ns))
        os.replace(folder / "new", file)

    for replace in (in_place, renamed):
        replace()
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert file.stat().st_mtime_ns == state.st_mtime_ns
        with pytest.raises(ValueError, match=r"isn't the file that channels.json describes"):
            open_source(data).rows("office", "test", 0, 2)
        file.write_bytes(before)
        open_source(data).rows("office", "test", 0, 2)
    file.write_bytes(before[:-40])
    with pytest.raises(ValueError, match=r"office-test.npy.*"):
        open_source(data).rows("office", "test", 0, 2)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"office-test.npy is missing"):
        open_source(data).rows("office", "test", 0, 2)


def test_exchanged_responses_or_users_are_never_used(tmp_path: Path) -> None:
    folder, hf = tmp_path / "x", np.ones((3, A, K), "c8")
    with Writer(folder) as out:
        out.add("all", "train", images(6), user=np.arange(6) // 2)
        out.add("all", "test", images(3), np.ones(3, "f4"), hf)
        made = out.finish(lambda sets: Description(angles=A, delays=D, subcarriers=K, sets=sets))
    source = open_source(DataSettings(source="files", path=str(folder)))
    asked: list[tuple[Stored | None, Callable[[], object]]] = [
        (made.of("all", "train")[0].user, lambda: source.rows("all", "train", 0, 6)),
        (made.of("all", "test")[0].frequency, lambda: source.frequency_rows("all", "test", 0, 3)),
    ]
    for stored, ask in asked:
        assert stored is not None
        file = folder / stored.name
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
        with pytest.raises(ValueError, match=rf"{stored.name} isn't the file that channels.json"):
            ask()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"angles": "6"}, "angles is '6'"),
        ({"angles": 10**9}, "angles is 1000000000"),
        ({"columns": 4}, "columns x rows x polarisations is 4, angles is 6"),
        ({"version": 2}, "expected format"),
        ({"kind": "x"}, "kind is 'x'"),
        ({"sets": []}, "describes no set"),
        ({"sets": [{}]}, "environment"),
        ({"more": 1}, "more"),
        ({"subcarriers": 2}, "subcarriers is 2"),
    ],
)
def test_a_wrong_description_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    data = written(tmp_path / "x")
    change(tmp_path / "x", **values)
    with pytest.raises(ValueError, match=rf"channels\.json can't be used: .*{message}"):
        open_source(data)


def test_a_description_names_only_files_of_its_folder() -> None:
    for name in ("../a.npy", "/a.npy", "a.mat"):
        with pytest.raises(ValueError, match="a file is called"):
            Description(angles=1, delays=1, sets=(Set("a", "train", 1, Stored(name, 1, "")),))


def test_sizes_that_the_rows_do_not_have(tmp_path: Path) -> None:
    data = written(tmp_path / "x")
    fewer = open_source(data, 4, 2)
    assert fewer.rows("office", "test", 0, 3).shape == (3, 2, 4, 2)
    assert fewer.frequency_rows("office", "test", 0, 3) == "they have 6 angles"
    assert (fewer.array, open_source(data).array) == ((4, 1, 1), (A, 1, 1))
    with pytest.raises(ValueError, match=r"model.angles is 32; .* have 6\. Set it to 1 … 6"):
        open_source(data, 32, 4)
    data = written(tmp_path / "planar", columns=3, rows=2)
    with pytest.raises(ValueError, match=r"model.angles is 4; .* Set it to 6\."):
        open_source(data, 4, 4)


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with Writer(folder) as out:
        out.add("all", "train", images(3))
        with pytest.raises(ValueError, match="angles is 0"):
            out.finish(lambda sets: Description(angles=0, delays=1, sets=sets))
    assert not list(tmp_path.iterdir())
    with Writer(folder), pytest.raises(BlockingIOError, match="another process"), Writer(folder):
        pass
    written(folder)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        written(folder)
    with pytest.raises(FileNotFoundError, match=r"has no channels\.json"):
        open_source(DataSettings(source="files", path=str(tmp_path)))


def test_a_user_whose_rows_are_held_out_is_trained_on_nowhere(tmp_path: Path) -> None:
    """Rows carry their user's number; users have 1 … 5 rows, validation users too."""
    users = np.repeat(np.arange(60), np.arange(60) % 5 + 1)
    with Writer(tmp_path / "x") as out:
        rows = np.broadcast_to((users / 128)[:, None, None, None], (len(users), 2, A, D))
        first, rest = users < 50, users >= 50
        out.add("all", "train", rows[first].astype("f4"), user=users[first])
        out.add("all", "val", rows[rest].astype("f4"), user=users[rest])
        out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
    data = DataSettings(source="files", path=str(tmp_path / "x"))
    source = open_source(data)
    dealt = Deal(
        tuple((Span("all", "train", start, start + 36),) for start in range(0, 180, 36)), ()
    )
    trained, held = set(), []
    for ue in range(5):
        mine = [part[:, 0, 0, 0] * 128 for part in load_ue(source, dealt, ue, 0.2)]
        assert sum(map(len, mine)) == 36
        assert abs(len(mine[1]) - 7) <= 2  # round(0.2 · 36), to the nearest border of users
        trained |= set(mine[0].tolist())
        held += list(dict.fromkeys(mine[1].tolist()))
    assert len(held) == len(set(held))
    assert not trained & set(held)
    assert trained | set(held) == set(range(60))
    assert max(held) >= 50 > min(held)  # the users are shuffled, of both files
    manifest = manifest_of(dealt, 0.2, source)
    assert sum(span.size for span in manifest.holdout[0]) == len(load_ue(source, dealt, 0, 0.2)[1])
    assert "permutation(60) of the users" in source.identity("all", "train")["order"]
    other = open_source(dataclasses.replace(data, seed=1))
    assert other.identity("all", "train") != source.identity("all", "train")


def test_a_ue_with_one_users_rows_holds_none_out(tmp_path: Path) -> None:
    with Writer(tmp_path / "x") as out:
        for ue in range(2):
            out.add(f"ue-{ue}", "train", images(20), user=np.full(20, ue))
        out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
    source = open_source(DataSettings(source="files", path=str(tmp_path / "x")))
    dealt = Deal(tuple((Span(f"ue-{ue}", "train", 0, 20),) for ue in range(2)), ())
    assert [len(part) for part in load_ue(source, dealt, 1, 0.1)] == [20, 0]


def test_rows_of_unknown_users_or_one_each_are_shuffled_alike(tmp_path: Path) -> None:
    found = []
    for name, user in (("unknown", None), ("own", np.arange(30)[::-1].copy())):
        with Writer(tmp_path / name) as out:
            out.add("all", "train", images(30), user=user)
            out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
        source = open_source(DataSettings(source="files", path=str(tmp_path / name)))
        assert source.user_borders("all", "train") is None
        found.append(source.rows("all", "train", 0, 30))
    np.testing.assert_array_equal(found[1], found[0])
    order = np.random.default_rng(np.random.SeedSequence((0, 0))).permutation(30)
    np.testing.assert_array_equal(found[0], images(30)[order])
    with Writer(tmp_path / "half") as out:
        out.add("all", "train", images(30))
        out.add("all", "val", images(10), user=np.zeros(10, int))
        out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
    half = open_source(DataSettings(source="files", path=str(tmp_path / "half")))
    assert half.user_borders("all", "train") is None
    assert half.rows("all", "train", 0, 40).shape == (40, 2, A, D)


def test_a_file_of_another_type_than_described_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3, dtype=np.int32))
    stored = Stored("x.npy", (tmp_path / "x.npy").stat().st_size, "")
    assert open_rows(tmp_path, stored, "<i4", (3,)).tolist() == [0, 1, 2]
    for dtype, shape in (("<f4", (3,)), ("<i4", (1, 3))):
        with pytest.raises(ValueError, match=r"x\.npy: it holds int32 \(3,\); channels"):
            open_rows(tmp_path, stored, dtype, shape)


def test_a_set_that_is_described_twice_is_refused() -> None:
    one = Set("all", "train", 3, Stored("x.npy", 9, ""))
    two = Set("all", "test", 3, Stored("y.npy", 9, ""))
    assert not Description(angles=4, delays=4, sets=(one, two)).planar
    crossed = Description(angles=4, delays=4, columns=2, polarisations=2, sets=(one, two))
    assert crossed.planar  # two polarisations of one line
    with pytest.raises(ValueError, match="all train is described twice"):
        Description(angles=4, delays=4, sets=(one, one))


def test_files_and_sets_come_in_the_order_of_their_environments(tmp_path: Path) -> None:
    assert file_name("a" * 99, 3, "val", "images") == f"{'a' * 99}-val.npy"
    assert file_name("a" * 100, 3, "val", "scale") == "environment-3-val-scale.npy"
    with Writer(tmp_path / "out") as out:
        out.add("b", "test", images(2))
        out.add("a", "train", images(2))
        out.add("b", "train", images(2))
        said = out.finish(lambda sets: Description(angles=A, delays=D, sets=sets))
    found = [(one.environment, one.part) for one in said.sets]
    assert found == [("b", "train"), ("b", "test"), ("a", "train")]
