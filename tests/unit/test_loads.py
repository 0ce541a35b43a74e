"""A test that looks for loads which could run code: nothing from a peer or a file is unpickled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""Nothing of these is imported."""
CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.distributed.checkpoint.load",
    "numpy.load",
    "numpy.lib.npyio.NpzFile",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "pandas.read_pickle",
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
}
ENDINGS = (
    "_object",  # torch.distributed's collectives of objects, however they are reached
    "_object_list",
    "_objects",
    "load_checkpoint",  # DeepSpeed's
    "load_module_state_dict",
    "load_state_dict_from_url",
)
HARMLESS = {
    "docstring_parser.parse_from_object",
    "parser.parse_object",  # jsonargparse's, of what YAML's safe loader read
    "self._engine.finalize_object",  # llvmlite's, of code that was just generated
    "compiler.emit_object",  # the same
}
"""Named like one of them."""
SAFE = {"numpy.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
"""What makes a call harmless, where it stands in the call as a constant."""
PERMITTED = {"csipipe/channels/rawarray.py": "torch.load"}
"""Of arrays that users saved with torch; nowhere else, however harmless."""


def names_of(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, dotted."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def risky(code: str) -> Iterator[str]:
    """Every import, call or mention in some code that could unpickle or run what it reads."""
    tree = ast.parse(code)
    names = names_of(tree)

    def dotted(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return names.get(first, first) + dot + rest

    for name in names.values():
        if name.split(".")[0] in MODULES:
            yield name
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in SAFE:
            word, value = SAFE[dotted(node.func)]
            for keyword in node.keywords:
                constant = keyword.value
                if keyword.arg == word and isinstance(constant, ast.Constant):
                    harmless |= {node.func, keyword} if constant.value is value else set()
        if node in harmless:
            if isinstance(node, ast.Attribute) and dotted(node) == "torch.load":
                yield "torch.load"
            continue
        if isinstance(node, ast.Name | ast.Attribute):
            name = dotted(node)
            if name in CALLS or (name.endswith(ENDINGS) and name not in HARMLESS):
                yield name
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            yield f"{node.arg}="


@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch.load('x')",
        "import torch as t; t.load('x')",
        "from torch import load as read; read('x')",
        "from pickle import loads",
        "import numpy as np; np.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import numpy as np; np.load('x', allow_pickle=anything)",
        "import numpy as np; np.fromfile('x', allow_pickle=True)",
        "import torch; torch.load('x', weights_only=False)",
        "import torch; torch.load('x', weights_only=True)",
        "import yaml; yaml.load('x', yaml.Loader)",
        "import torch.distributed as dist; dist.broadcast_object_list([])",
        "from torch.distributed import all_gather_object",
        "call = dist.scatter_object_list",
        "engine.load_checkpoint('x')",
        "eval('1')",
    ],
)
def test_what_could_run_code_is_found(code: str) -> None:
    found = list(risky(code + "\nall_gather_object" if "from torch.dist" in code else code))
    assert found, code


def test_nothing_is_unpickled() -> None:
    files = [*(ROOT / "csipipe").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    assert len(files) > 50
    found = {str(file.relative_to(ROOT)): list(risky(file.read_text())) for file in files}
    for file, name in PERMITTED.items():
        assert found.pop(file) == [name]
    assert not {file: what for file, what in found.items() if what}
