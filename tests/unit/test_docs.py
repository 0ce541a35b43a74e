"""README, CONTRIBUTING and docs/: what they show exists: commands, options, settings, files, links.

Commands are parsed by the parsers that would take them, and not run. Blocks marked `sh` are
commands, line by line; so is code inside a sentence that starts with one of `PROGRAMS`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import shlex
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from csipipe import __version__
from csipipe.__main__ import COMMANDS
from csipipe.bench import command as benchmark
from csipipe.channels import command as channels
from csipipe.compare import command as comparison
from csipipe.evaluation import command as evaluation
from csipipe.evaluation import leak
from csipipe.export import command as export
from csipipe.gpucheck import command as gpucheck
from csipipe.links import command as links
from csipipe.reports import command as reports
from csipipe.reports import plan, reproduce
from csipipe.run import scripts
from csipipe.settings import commandline, tables
from csipipe.settings.config import Settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = commandline.dotted(commandline.plain(Settings()))
SECTIONS = {key.split(".")[0] for key in SETTINGS if "." in key}
FOLDERS = ("csipipe", "launch", "slurm", "tests", "ds_configs", "docs", ".ci")
OTHERS = ("git", "ssh", "squeue", "scancel", "touch", "module", "ruff", "mypy", "mkdocs", ".", "cd")
"""Programs whose arguments aren't looked at."""
SLURM = {
    *("--array", "--batch", "--cpus-per-task", "--gpus-per-node", "--nodes", "--ntasks"),
    *("--ntasks-per-node", "--signal"),
}
"""Options of SLURM's commands that the pages show."""


def check_settings(words: Sequence[str]) -> None:
    """Settings of a training, by name and value."""
    with contextlib.suppress(SystemExit):  # --help and --print_config leave; errors are raised
        commandline.settings(train_parser(), words)


@functools.cache
def train_parser() -> Any:
    """One for all: it takes a while to make."""
    return commandline.parser("")


def check_run_command(options: ModuleType) -> Callable[[list[str]], None]:
    """A command on a run, which passes settings on."""

    def check(words: list[str]) -> None:
        parser = commandline.RunParser("", "")
        options.add_arguments(parser)
        check_settings(parser.parse(words)[1])

    return check


def check_benchmark(words: list[str]) -> None:
    commandline.settings(benchmark.parser(), words)


def check_compare(words: list[str]) -> None:
    check_settings(comparison.parser().parse_known_args(words)[1])


def check_links(words: list[str]) -> None:
    check_settings(links.parser().parse_known_args(words)[1])


def check_channels(words: list[str]) -> None:
    channels.parser().parse_args(words)


def check_reproduce(words: list[str]) -> None:
    options, settings = reproduce.parser().parse_known_args(words)
    options.settings = settings
    if options.report == "plan":
        plan.configuration(options.preset, options.settings)
    elif "preset" in options:
        reports.report(options)
    else:
        assert not options.settings


def check_slurm(words: list[str]) -> None:
    scripts.parser().parse_args(words)


def check_gpucheck(words: list[str]) -> None:
    gpucheck.parser().parse_args(words)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "train": check_settings,
    "evaluate": check_run_command(evaluation),
    "compare": check_compare,
    "leak": check_run_command(leak),
    "export": check_run_command(export),
    "benchmark": check_benchmark,
    "links": check_links,
    "channels": check_channels,
    "reproduce": check_reproduce,
    "slurm": check_slurm,
    "gpucheck": check_gpucheck,
}
assert CHECKS.keys() == COMMANDS.keys()


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "csipipe"]:
        if words[2:]:
            CHECKS[words[2]](words[3:])
        return
    if words[:1] == ["-m"]:
        if words[1:3] == ["csipipe", "gpucheck"]:
            gpucheck.parser().parse_args(words[3:])
            return
        assert words[1] == "venv", f"python -m {words[1]} isn't known here"
        return
    existing(words[0])
    if words[0].startswith("launch/"):
        CHECKS[Path(words[0]).stem](words[1:])


def check_torchrun(words: list[str]) -> None:
    parsed = get_args_parser().parse_args(words)
    module = ["-m"] if parsed.module else []
    check_python([*module, parsed.training_script, *parsed.training_script_args])


def check_sbatch(words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if not word.startswith("-"))
    assert {word.split("=")[0] for word in words[:place]} <= SLURM
    existing(words[place])
    rest = words[place + 1 :]
    if words[place] == "slurm/sweep.sbatch":
        check_reproduce(rest if rest and rest[0][0] != "-" else ["fig6", *rest])
    else:
        check_settings(rest)


def check_pytest(words: list[str]) -> None:
    marks = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "-m":
            assert words.pop(0) in marks
        elif word == "-k":
            words.pop(0)
        elif not word.startswith("-"):
            existing(word)


def check_pip(words: list[str]) -> None:
    if words[-1].endswith(".whl"):
        assert words == ["install", f"csipipe-{__version__}-py3-none-any.whl"]
        return
    assert words[:4] == ["install", "-c", "constraints.txt", "-e"]
    for extra in re.findall(r"\w+", words[4]):
        assert extra in extras(), f"setup.py has no extra {extra}"


def check_tensorboard(words: list[str]) -> None:
    assert len(words) == 2
    assert words[0] == "--logdir"


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "python3": check_python,
    "torchrun": check_torchrun,
    "sbatch": check_sbatch,
    "pytest": check_pytest,
    "pip": check_pip,
    "tensorboard": check_tensorboard,
}


def extras() -> set[str]:
    """Extras in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            return set(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no extras_require")


def existing(name: str) -> None:
    """A file or folder of the repository."""
    assert (ROOT / name).exists(), f"there is no {name}"


def check_command(line: str) -> None:
    """A line of a shell: every program in it is known, and its arguments are right."""
    words = shlex.split(line.replace("&&", " && "), comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        command, words = words[:end], words[end + 1 :]
        command = command[: command.index(">")] if ">" in command else command
        while re.match(r"[A-Z_]+=", command[0]):
            command = command[1:]
        program, *arguments = command
        assert program in PROGRAMS or program in OTHERS, f"{program} isn't known here"
        if program in PROGRAMS:
            PROGRAMS[program](arguments)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of fenced blocks."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Code inside of sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(page: Path) -> list[str]:
    """Every command that a page shows."""
    text = page.read_text()
    shown = [
        line for kind, block in blocks(text) if kind == "sh" for line in block.splitlines() if line
    ]
    # code that only names a program has no space; …: something is left out
    shown += [s for s in spans(text) if s.split()[0] in PROGRAMS and " " in s and "…" not in s]
    return shown


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


SHOWN = [pytest.param(c, id=f"{p.name}: {c}") for p in PAGES for c in commands(p)]


@pytest.mark.parametrize("line", SHOWN)
def test_every_command_would_be_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "torchrun --nproc_per_node=4 launch/train.py --train.learning_rate 1",
        "torchrun --nosuch=4 launch/train.py",
        "torchrun --nproc_per_node=4 launch/trian.py",
        "torchrun --nproc_per_node=4 launch/train.py --config launch/configs/nosuch.yaml",
        "torchrun --nproc_per_node=4 -m csipipe train --train.learning_rate 1",
        "torchrun --nproc_per_node=4 -m csipipe trian",
        "python -m csipipe evaluate RUN --nosuch 1",
        "python launch/evaluate.py RUN --nosuch 1",
        "python launch/export.py RUN --ue first",
        "python launch/channels.py examine DIR",
        "python launch/benchmark.py --nosuch 3",
        "python launch/reproduce.py fig7",
        "python launch/reproduce.py fig6 --preset nosuch",
        "python launch/reproduce.py table1 --slow",
        "sbatch slurm/nosuch.sbatch",
        "sbatch slurm/sweep.sbatch --train.lr 1",
        "pytest -m nosuch",
        "pytest tests/unit/test_nosuch.py",
        "pip install -c constraints.txt -e '.[nosuch]'",
        "nosuch --help",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ArgumentError, KeyError, OSError, SystemExit, ValueError)):
        check_command(line)


def test_blocks_say_what_they_are() -> None:
    for page in PAGES:
        assert {kind for kind, _ in blocks(page.read_text())} <= {"sh", "text"}, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_options_settings_and_files_in_sentences_exist(page: Path) -> None:
    known = options()
    for span in spans(page.read_text()):
        for word in span.split():
            word = word.rstrip(",.:;")
            if "…" in word:  # something is left out
                continue
            if re.match(r"--[a-z]", word):
                name = word.split("=")[0]
                assert name in known or name[2:] in SETTINGS, f"{page.name}: no option {name}"
            elif re.fullmatch(rf"({'|'.join(SECTIONS)})\.\w+", word):
                assert word in SETTINGS, f"{page.name}: no setting {word}"
            elif word.split("/")[0] in FOLDERS and "/" in word:
                assert (ROOT / word).exists(), f"{page.name}: there is no {word}"


@functools.cache
def options() -> set[str]:
    """Options of all commands, and those of torchrun and sbatch that the pages name."""
    run_options = commandline.RunParser("", "")
    evaluation.add_arguments(run_options)
    also_export = commandline.RunParser("", "")
    export.add_arguments(also_export)
    also_leak = commandline.RunParser("", "")
    leak.add_arguments(also_leak)
    parsers: list[Any] = [
        commandline.parser(""),
        run_options,
        also_export,
        also_leak,
        benchmark.parser(),
        comparison.parser(),
        links.parser(),
        *subcommands(reproduce.parser()),
        *subcommands(channels.parser()),
        scripts.parser(),
        gpucheck.parser(),
        get_args_parser(),
    ]
    found = {option for parser in parsers for option in parser._option_string_actions}
    return found | SLURM


def subcommands(parser: Any) -> list[Any]:
    """The parsers of a parser's commands."""
    return [
        command
        for action in parser._actions
        if isinstance(action.choices, dict)
        for command in action.choices.values()
    ]


def test_the_table_of_settings_gives_their_defaults() -> None:
    rows = re.findall(
        r"^\| `--([\w.]+)` \| ([^|]+) \|",
        (ROOT / "docs" / "configuration.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) > 8
    for name, default in rows:
        value = SETTINGS[name]
        said = "null" if value is None else str(value).lower() if value in (True, False) else value
        assert default == str(said), f"--{name} is {said} by default"


ROWS: dict[str, Mapping[str, object]] = {
    "README.md": tables.METHODS,
    "docs/methods.md": tables.METHODS,
    "docs/models.md": tables.MODELS,
    "docs/data.md": tables.SOURCES,
    "csipipe/settings/sections/comm.py": tables.CODECS,  # what --help says
}


@pytest.mark.parametrize("page", ROWS)
def test_every_row_of_a_table_is_in_its_page(page: str) -> None:
    text = (ROOT / page).read_text()
    missing = [name for name in ROWS[page] if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not missing, f"{page} says nothing of {', '.join(missing)}"


def test_every_link_leads_somewhere() -> None:
    found = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            name, _, anchor = " ".join(target.split()).partition("#")
            if name.startswith("https://"):
                continue
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: no heading {target}"
            found += 1
    assert found > 30


def test_the_readme_is_short_and_its_tree_is_the_tree() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    tree = next(block for kind, block in blocks(text) if block.startswith("launch/"))
    top = {line.split()[0].rstrip("/") for line in tree.splitlines() if line[0] != " "}
    assert all((ROOT / name).exists() for name in top)
    said = {
        word.rstrip("/")
        for line in tree.splitlines()
        if line.startswith("  ")
        for word in (line.split() if ".py" in line else line.split()[:1])
    }
    rooms = {path.name for path in (ROOT / "csipipe").iterdir() if path.name[0] not in "_."}
    assert said == rooms - {"py.typed"}
