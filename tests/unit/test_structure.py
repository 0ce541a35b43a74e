"""The walls of the house: imports go down only, and few rooms touch the outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from csipipe.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]

# a room imports rooms of lower levels only; rooms on one level don't import each other
LEVELS = [
    {"branches", "files", "__version__"},
    {"entry", "settings", "measure", "checkpoint", "plotting"},
    {"models", "channels", "device"},
    {"comm"},
    {"pipeline", "tracking"},
    {"methods"},
    {"bench", "profiling"},
    {"run"},
    {"export", "gpucheck"},
    {"evaluation"},
    {"reports"},
    {"links"},
    {"compare"},
    {"__main__"},
    {"launch"},
]


def sources() -> Iterator[tuple[str, Path]]:
    """(room, file) of every source file."""
    for file in sorted((ROOT / "csipipe").rglob("*.py")):
        room = file.relative_to(ROOT / "csipipe").parts[0].removesuffix(".py")
        if room != "__init__":
            yield room, file
    for file in sorted((ROOT / "launch").glob("*.py")):
        yield "launch", file


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down_only() -> None:
    level = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
    assert {room for room, _ in sources()} == level.keys() - {"__version__"}
    for room, file in sources():
        for name in imports(file):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top == "csipipe" and target != room:
                assert level[target] < level[room], f"{file} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (ROOT / "csipipe").rglob("*.py")
    }
    sorter = TopologicalSorter(
        {
            module: {
                name if name in modules else name.rpartition(".")[0]
                for name in imports(file)
                if name.startswith("csipipe.")
            }
            for module, file in modules.items()
        }
    )
    sorter.prepare()  # CycleError names the circle


def test_only_the_pipeline_imports_deepspeed() -> None:
    users = {
        file.relative_to(ROOT).as_posix()
        for _, file in sources()
        for name in imports(file)
        if name.split(".")[0] == "deepspeed"
    }
    assert users == {
        "csipipe/pipeline/engine.py",
        "csipipe/pipeline/partition.py",
        "csipipe/pipeline/subworld.py",
        "csipipe/bench/stock.py",  # a peer: DeepSpeed's own engine is what is measured
    }


def test_only_comm_moves_tensors_between_ues_and_bts() -> None:
    users = {
        file.relative_to(ROOT).as_posix()
        for _, file in sources()
        if any(name.startswith("torch.distributed") for name in imports(file))
    }
    # world starts and ends the group; the pipeline's files confine DeepSpeed to the BTS
    assert users == {
        "csipipe/comm/channel.py",
        "csipipe/comm/collectives.py",
        "csipipe/comm/groups.py",
        "csipipe/comm/meeting.py",
        "csipipe/comm/texts.py",
        "csipipe/comm/wire.py",
        "csipipe/comm/world.py",
        "csipipe/pipeline/engine.py",
        "csipipe/pipeline/subworld.py",
        # the benchmark: its conductor hosts a key-value store, its ranks meet before and after a
        # turn, and a peer moves tensors between stages its own way; UEs are reached by the wire
        "csipipe/bench/conductor.py",
        "csipipe/bench/rank.py",
        "csipipe/bench/peerstage.py",
        "csipipe/bench/torchpipe.py",
        # what a machine with a GPU is asked: which backends it has, how fast two processes talk
        "csipipe/gpucheck/loopback.py",
        "csipipe/gpucheck/versions.py",
    }


def test_ue_code_loads_no_deepspeed() -> None:
    code = "import sys, csipipe.run.training, csipipe.methods; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_scripts_are_commands() -> None:
    scripts = sorted((ROOT / "launch").glob("*.py"))
    assert {"train", "evaluate", "channels"} <= {script.stem for script in scripts}
    for script in scripts:
        assert script.stem in COMMANDS
        assert set(imports(script)) == {"sys", "csipipe.__main__.command"}
        assert f'command("{script.stem}")' in script.read_text()


def test_a_command_is_chosen_without_importing_another() -> None:
    code = """
import sys
from csipipe.__main__ import main
assert main(["slurm"]) == 0
sys.exit(bool({"torch", "numpy", "jsonargparse"} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_files_just_written_are_loaded_as_programs() -> None:
    # torch.export.load can run code that is in the file
    users = {
        file.relative_to(ROOT).as_posix()
        for _, file in sources()
        if "torch.export.load" in file.read_text()
    }
    assert users == {
        "csipipe/export/formats.py",  # to check what it has written
        "csipipe/export/feedback_torch.py",  # by its digest
    }
