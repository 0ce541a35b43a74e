"""The tables of methods, models and sources: complete, light, and the only ones who know names."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from csipipe import models
from csipipe.settings import commandline, tables
from csipipe.settings.config import ModelSettings, Settings
from csipipe.settings.tables import METHODS, TABLES, MethodSpec, check, found, listed

ROOT = Path(__file__).parents[2]
NAMES = {name for table in TABLES.values() for name in table} - {"files", "linear"}
"""Without ordinary words, a key in JSON and a head; `data.source == …` is found regardless."""
DATA = {
    "csipipe/settings/tables.py",
    "csipipe/plotting.py",  # how the paper's methods look
    "csipipe/reports/preset.py",  # which methods the paper compares
    "csipipe/reports/accuracy.py",  # which methods it shows
    "csipipe/reports/bytes.py",  # whose bytes are compared
    "csipipe/reports/headline.py",  # its figures of three of them
    "csipipe/reports/fig6_claims.py",  # its claims about two of them
    "csipipe/gpucheck/parity.py",  # which run is compared with itself on a CPU
    "csipipe/gpucheck/curve.py",  # which channels the paper's preset trains on there
}
"""Files that hold names as data; they compare none either."""
SETTINGS = ("method", "source", "name")
"""How the attributes that hold a name are called; `name` of `model` alone."""


def dotted() -> Iterator[str]:
    for table in TABLES.values():
        for row in table.values():
            values = dataclasses.asdict(row).values()
            yield from (v for v in values if isinstance(v, str) and v.startswith("csipipe."))


def test_every_row_names_code_that_is_there() -> None:
    names = sorted(set(dotted()))
    assert len(names) >= 3 + len(METHODS)
    assert all(callable(found(name)) for name in names)


@pytest.mark.parametrize(
    ("fact", "word", "words"),
    [
        ("shared", "encodr", "encoder, tail, head"),
        ("crosses", "updates", "smashed, output, .*, update, mean_update"),
    ],
)
def test_a_word_of_a_method_that_there_is_not_is_named(fact: str, word: str, words: str) -> None:
    row = METHODS["fedavgper"]
    with pytest.raises(
        ValueError, match=f"^{fact} of the method 'fedavg, with .*'{word}'.*{words}.$"
    ):
        MethodSpec(**vars(row) | {fact: (*getattr(row, fact), word)})


def test_settings_load_nothing_heavy_and_no_row_loads_deepspeed() -> None:
    code = (
        "import sys, csipipe.settings.commandline\n"
        "assert not {'torch', 'scipy', 'deepspeed', 'matplotlib'} & set(sys.modules)\n"
        "from csipipe.settings import tables\n"
        f"for name in {sorted(set(dotted()))}: tables.found(name)\n"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Names


def compared(source: str) -> Iterator[str]:
    """Places where a program tells methods, models or sources apart by name."""
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript):  # a table of one's own
            parts = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith", "removesuffix", "removeprefix"):
                parts = [node.func.value]
            elif node.func.attr == "get":
                parts = node.args
        if any(map(_holds_a_name, parts)):
            yield f"line {parts[0].lineno}: {ast.unparse(node)}"


def _holds_a_name(node: ast.expr) -> bool:
    """A name as text, a tuple or list of them, or a setting that holds one."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(_holds_a_name, node.elts))
    if isinstance(node, ast.Constant):
        return node.value in NAMES
    if isinstance(node, ast.Attribute) and node.attr in SETTINGS[:2]:
        return ast.unparse(node.value).endswith(("settings", "data", "run", "row", "r"))
    return isinstance(node, ast.Attribute) and ast.unparse(node).endswith("model.name")


def written(source: str) -> Iterator[str]:
    """Names of rows as text, but for the defaults of fields."""
    tree = ast.parse(source)
    defaults = {
        id(field.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES and id(node) not in defaults:
            yield f"line {node.lineno}: {node.value!r}"


ALLOWED = ("METHODS[", "MODELS[", "SOURCES[", "MODELS.get(", "tables.check(")
"""Looking a row up is what the tables are for."""


def test_no_other_file_compares_a_name() -> None:
    for file in [*(ROOT / "csipipe").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        where = file.relative_to(ROOT).as_posix()
        source = file.read_text()
        told = [place for place in compared(source) if not any(a in place for a in ALLOWED)]
        if where != "csipipe/settings/tables.py":
            assert not told, f"{where}, {told[0]}; ask the row in csipipe/settings/tables.py"
        if where not in DATA:
            told = list(written(source))
            assert not told, f"{where}, {told[0]}; ask the row in csipipe/settings/tables.py"


@pytest.mark.parametrize(
    "planted",
    [
        'x = settings.method == "csilocal"',
        'if method in ("fedavg", "fedprox"): pass',
        "if settings.method not in LOCAL_STEPS: pass",
        'x = self.settings.method.startswith("fed")',
        'x = method.endswith("per") or settings.method.endswith("per")',
        'x = {"centralised": 0}.get(settings.method, 1)',
        "x = NAMES[r.method]",
        "x = data.source != OURS",
        'match name:\n  case "synthetic": pass',
        "x = settings.model.name == MINE",
    ],
)
def test_a_comparison_is_found(planted: str) -> None:
    assert list(compared(planted))


def test_a_name_is_found() -> None:
    assert list(written('class A:\n    method: str = "csilocal"\nx = "fedavg"\n')) == [
        "line 3: 'fedavg'"
    ]


# What a user sees


@pytest.mark.parametrize("setting", TABLES)
def test_an_unknown_name_is_told_which_there_are(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} is 'magic'; it must be one of") as error:
        commandline.read([f"--{setting}", "magic"])
    assert all(name in str(error.value) for name in TABLES[setting])
    assert ("package.module:function" in str(error.value)) == (setting in tables.OWN)


@pytest.mark.parametrize("setting", TABLES)
def test_help_lists_every_name(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    section = setting.split(".")[0] if "." in setting else None
    with pytest.raises(SystemExit):
        commandline.settings(commandline.parser(""), ["--help", *([section] if section else [])])
    text = " ".join(capsys.readouterr().out.split())
    assert listed(setting) in text


def test_only_models_may_be_the_users_own() -> None:
    check("model.name", "package.module:function")
    for setting in ("method", "data.source"):
        with pytest.raises(ValueError, match="must be one of"):
            check(setting, "package.module:function")


# A user's own model


def whole(
    angles: int, delays: int, c1: int, c2: int
) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    reals = 2 * angles * delays
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(reals, c1))
    head = nn.Sequential(nn.Linear(c2, reals), nn.Unflatten(1, (2, angles, delays)), nn.Sigmoid())
    return encoder, [nn.Linear(c1, c2)], head


def narrow(angles: int, delays: int, c1: int, c2: int) -> object:
    return whole(angles, delays, c1, c2 - 1)


def broken(angles: int, delays: int, c1: int, c2: int) -> object:
    raise RuntimeError("no such thing")


def short(angles: int, delays: int) -> object:
    return whole(angles, delays, 6, 5)


def halves(angles: int, delays: int, c1: int, c2: int) -> object:
    return whole(angles, delays, c1, c2)[:2]


def single(angles: int, delays: int, c1: int, c2: int) -> object:
    return nn.Linear(c1, c2)


def small(function: str) -> ModelSettings:
    return ModelSettings(name=f"{__name__}:{function}", c1=6, c2=5, angles=4, delays=8)


def test_a_model_of_ones_own_is_built_from_the_seed() -> None:
    model = small("whole")
    models.check(model)
    assert models.count_parts(model) == {"encoder": 390, "tail": 35, "head": 384}
    assert models.tail_shapes(model) == [(6,), (5,)]
    one, same = (torch.cat([p.flatten() for p in _parameters(model, 3)]) for _ in range(2))
    other = torch.cat([p.flatten() for p in _parameters(model, 4)])
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert Settings(model=model).partition == tables.OWN_PARTITION


def _parameters(model: ModelSettings, seed: int) -> list[nn.Parameter]:
    parts = [models.build_encoder(model, seed), *models.build_tail(model, seed)]
    return [p for part in [*parts, models.build_head(model, seed)] for p in part.parameters()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at.all:build", r"^model.name is 'nowhere.at.all:build', which can't .*No module"),
        (f"{__name__}:nobody", "can't be imported .*nobody"),
        (":", "can't be imported"),
        (f"{__name__}:broken", r"c2\) = \(4, 8, 6, 5\), fails: RuntimeError: no such thing$"),
        (f"{__name__}:short", r"c2\) = \(4, 8, 6, 5\), fails: TypeError: short\(\) takes 2 "),
        (f"{__name__}:halves", r"returns a tuple of 2; it must be \(encoder, tail, head\)\.$"),
        (f"{__name__}:single", r"returns a Linear; it must be \(encoder, tail, head\)\.$"),
        (f"{__name__}:narrow", r"tail makes \(4,\) from a row of shape \(6,\); it must be \(5,\)"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        models.check(dataclasses.replace(small("whole"), name=name))
    assert str(refusal.value).count("model.name is") == 1
